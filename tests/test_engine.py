from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import TRAINED, join_alone, small_engine

import model.network.ranks
import model.training.states
from model.network.packing import Batch, Shards, batch_of_rows
from model.sampling.sampler import Sampling, sample
from model.training.engine import (
    EngineParams,
    Step,
    deepspeed_config,
    gathered,
    num_micro_batches,
    token_loss,
    train_step,
)
from model.training.states import load_state, save_state
from tasks.workers.launch import LOOPBACK

CPU = torch.device("cpu")
CONTEXT = 16


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    join_alone()


def batches(step: int, rows: int, micro_rows: int) -> tuple[list[Batch], int]:
    """Micro batches with unequal numbers of targets, the same for the same step."""
    rng = np.random.default_rng(step)
    stream = Shards([(np.cumsum(rng.integers(0, 3, size=rows * CONTEXT + 1)) % 64).astype(np.uint16)])
    starts = np.array([0, 3, 5, 9, 11, 14, 40, 90])
    parts = [batch_of_rows(stream, starts, row, micro_rows, CONTEXT, CPU) for row in range(0, rows, micro_rows)]
    return parts, sum(part.num_targets for part in parts)


def train(engine: Any, steps: range, micro_rows: int = 4, accepts: Any = lambda loss, norm: True) -> list[Step]:
    found = []
    for step in steps:
        parts, num_targets = batches(step, 8, micro_rows)
        found.append(train_step(engine, parts, token_loss, num_targets, accepts))
    return found


def weights_of(engine: Any) -> list[torch.Tensor]:
    import deepspeed

    copies = []
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            copies.append(parameter.detach().clone())
    return copies


def plain_training(steps: int) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """The same training in a plain torch loop: whole batches, the mean over tokens, the schedule by its formula."""
    engine = small_engine(20)  # only for its first weights
    module = engine.module
    matrices = [p for p in module.parameters() if p.dim() > 1]
    norms = [p for p in module.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.95), eps=1e-5,
    )  # fmt: skip
    losses, gradient_norms = [], []
    for step in range(steps):
        number = step + 1
        share = number / 4 if number < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (number - 3) / 17)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        (batch,), num_targets = batches(step, 8, 8)
        loss = module(batch.ids, batch.documents, batch.targets).sum() / num_targets
        optimizer.zero_grad()
        loss.backward()
        gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, gradient_norms, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_equals_a_plain_loop_whatever_the_micro_batches(zero_stage: int) -> None:
    losses, gradient_norms, weights = plain_training(6)
    engine = small_engine(20, zero_stage=zero_stage)
    steps = train(engine, range(6))
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step.gradient_norm for step in steps] == pytest.approx(gradient_norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.1
    for ours, reference in zip(weights_of(engine), weights, strict=True):
        assert torch.allclose(ours, reference, atol=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_keeps_masters_and_stays_near_fp32(zero_stage: int) -> None:
    exact = train(small_engine(20), range(6))
    rounded = small_engine(20, zero_stage=zero_stage, precision="bf16")
    steps = train(rounded, range(6))
    assert {weight.dtype for weight in rounded.module.parameters()} == {torch.bfloat16}
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in exact], abs=0.03)
    masters = [group["params"] for group in rounded.basic_optimizer.param_groups]
    assert all(weight.dtype == torch.float32 for group in masters for weight in group)


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_its_share() -> None:
    rates = [step.learning_rate for step in train(small_engine(20), range(20))]
    assert rates[:3] == pytest.approx([0.0025, 0.005, 0.0075])
    assert rates[10] == pytest.approx(1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 17)) / 2))
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[-2] > 1.01e-3


def test_the_optimiser_state_can_be_offloaded() -> None:
    kept = train(small_engine(20, zero_stage=2), range(4))
    offloaded = train(small_engine(20, zero_stage=2, offload="cpu"), range(4))
    assert [step.loss for step in offloaded] == pytest.approx([step.loss for step in kept], abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_refused_update_leaves_no_trace(zero_stage: int, precision: str) -> None:
    undisturbed = small_engine(20, zero_stage=zero_stage, precision=precision)
    train(undisturbed, range(2))
    before = weights_of(undisturbed)
    engine = small_engine(20, zero_stage=zero_stage, precision=precision)
    asked: list[tuple[float, float]] = []

    def refuses(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return False

    train(engine, range(2))
    (step,) = train(engine, range(50, 51), accepts=refuses)
    assert asked == [(step.loss, step.gradient_norm)]  # asked once, with what is reported
    assert not step.updated
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
    # the next step is that of an engine that never saw the batch, but for its learning rate, one step on
    for one in (undisturbed, engine):
        one.lr_scheduler.step(9)
        train(one, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(undisturbed), weights_of(engine), strict=True))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_what_is_not_finite_is_reported_and_changes_nothing(zero_stage: int) -> None:
    engine = small_engine(20, zero_stage=zero_stage, precision="bf16")
    train(engine, range(1))
    before = weights_of(engine)
    parts, _ = batches(1, 8, 4)
    over_none = 0  # targets: an infinite loss
    step = train_step(engine, parts, token_loss, over_none, lambda loss, norm: math.isfinite(loss + norm))
    assert not math.isfinite(step.loss) and not step.updated
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_engine_goes_on_exactly(zero_stage: int, precision: str, tmp_path: Path) -> None:
    engine = small_engine(20, zero_stage=zero_stage, precision=precision)
    train(engine, range(3))
    save_state({"model": engine}, tmp_path, 3, {"losses": [0.1, 1 / 3]})
    expected = train(engine, range(3, 6))
    again = small_engine(20, seed=2, zero_stage=zero_stage, precision=precision)
    assert load_state({"model": again}, tmp_path) == (3, {"losses": [0.1, 1 / 3]})
    assert train(again, range(3, 6)) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(again), strict=True))


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_two_engines_are_one_state_and_go_on_exactly(zero_stage: int, precision: str, tmp_path: Path) -> None:
    settings = {"zero_stage": zero_stage, "precision": precision}
    policy, value = small_engine(20, **settings), small_engine(12, seed=2, learning_rate=3e-3, **settings)
    for steps in (range(1), range(1, 3)):
        train(policy, steps), train(value, steps)
        save_state({"policy": policy, "value": value}, tmp_path, steps.stop, {"step": steps.stop})
    state = tmp_path / "step-3"
    assert names(state) == ["policy", "value"]
    manifest = json.loads((state / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(str(file.relative_to(state)) for file in state.glob("*/*"))
    expected = [train(engine, range(3, 6)) for engine in (policy, value)]
    assert expected[0] != expected[1]
    others = small_engine(20, seed=3, **settings), small_engine(12, seed=4, learning_rate=3e-3, **settings)
    assert load_state(dict(zip(("policy", "value"), others, strict=True)), tmp_path) == (3, {"step": 3})
    assert [train(engine, range(3, 6)) for engine in others] == expected
    for one, other in zip((policy, value), others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))
    damaged = next((state / "value").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{damaged} is damaged"):
        load_state(dict(zip(("policy", "value"), others, strict=True)), tmp_path)


def saved(directory: Path, steps: list[int]) -> Any:
    engine = small_engine(20, zero_stage=1, precision="bf16")
    for step in steps:
        save_state({"model": engine}, directory, step, {})
    return engine


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def test_only_the_newest_two_states_stay(tmp_path: Path) -> None:
    saved(tmp_path, [2, 9, 10])
    assert names(tmp_path) == ["step-10", "step-9"]
    assert load_state({"model": saved(tmp_path / "other", [])}, tmp_path / "nothing") is None


def test_a_save_that_broke_off_is_not_seen(tmp_path: Path) -> None:
    engine = saved(tmp_path, [5])
    shutil.copytree(tmp_path / "step-5", tmp_path / ".partial")
    (tmp_path / ".partial" / "manifest.json").unlink()
    assert load_state({"model": engine}, tmp_path) == (5, {})
    save_state({"model": engine}, tmp_path, 6, {})
    assert names(tmp_path) == ["step-5", "step-6"]


def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path) -> None:
    engine = saved(tmp_path, [4, 5])
    newest = tmp_path / "step-5"
    files = sorted(json.loads((newest / "manifest.json").read_text())["files"])
    assert len(files) == 2
    remedy = f"delete `{newest}` to resume from `{tmp_path / 'step-4'}`"
    rng = random.Random(1)
    for name in files:
        content = (newest / name).read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1
        for damaged in (content[:-100], bytes(flipped), b""):
            (newest / name).write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged") as caught:
                load_state({"model": engine}, tmp_path)
            assert str(newest / name) in str(caught.value) and remedy in str(caught.value)
        (newest / name).write_bytes(content)
    (newest / files[0]).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"{files[0]} is missing: delete"):
        load_state({"model": engine}, tmp_path)
    (newest / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged: delete"):
        load_state({"model": engine}, tmp_path)
    shutil.rmtree(tmp_path / "step-4")
    with pytest.raises(ValueError, match=f"delete `{newest}` to resume from the beginning"):
        load_state({"model": engine}, tmp_path)


def test_a_state_of_other_ranks_is_refused(tmp_path: Path) -> None:
    engine = saved(tmp_path, [5])
    manifest = tmp_path / "step-5" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_ranks": 2}))
    with pytest.raises(ValueError, match=r"written by 2 ranks, and this run has 1: set `machine\.num_ranks` back"):
        load_state({"model": engine}, tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("this code must not run",))


def test_pickled_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": Malicious()}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        model.training.states.StateFiles().load(str(tmp_path / "state.pt"))
    assert capsys.readouterr().out == ""


def params_of(**changes: Any) -> EngineParams:
    return EngineParams.model_validate({**TRAINED, **changes})


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert num_micro_batches(params_of(), num_ranks=2) == 1
    with pytest.raises(ValueError, match="`batch_rows` 8 is not a multiple of `micro_batch_rows` 4 x 3 ranks = 12"):
        num_micro_batches(params_of(), num_ranks=3)


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a warm-up of 4 \(`warmup_steps`, `warmup_ratio`\) leaves none of 4 steps"):
        deepspeed_config(params_of(), num_ranks=1, num_steps=4)
    with pytest.raises(ValueError, match=r"a warm-up of 9 .* leaves none of 9 steps"):
        deepspeed_config(params_of(warmup_ratio=0.9), num_ranks=1, num_steps=9)


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(100, 5), (180, 6), (1000, 30)])
def test_the_warm_up_is_a_share_of_the_steps_but_at_least_so_many(num_steps: int, warmup_steps: int) -> None:
    config = deepspeed_config(params_of(warmup_steps=5, warmup_ratio=0.03), num_ranks=1, num_steps=num_steps)
    assert config["scheduler"]["params"]["warmup_num_steps"] == warmup_steps


def test_offload_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="offload needs zero_stage 1, 2 or 3"):
        params_of(offload="cpu")


def samples_of(engine: Any) -> list[list[int]]:
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=12)
    prompts = [[1, 5, 9], [1], [1, 60, 33, 2, 7]]
    with gathered(engine) as model:
        assert all(weight.dim() > 0 and weight.numel() > 0 for weight in model.parameters())
        responses = sample(
            model, prompts, sampling, num_samples=2, eos_id=2, seeds=[1, 2, 3], max_rows=4, description=None
        )
    return [response.ids for group in responses for response in group]


def on_two_ranks(work: Callable[[], dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """What each of two ranks returns, processes of their own that meet through a file."""
    fresh = multiprocessing.get_context("spawn")
    ranks = [fresh.Process(target=_work_as_a_rank, args=(work, rank, directory)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=180)
    return [json.loads((directory / f"found.{rank}").read_text()) for rank in (0, 1)]


def _work_as_a_rank(work: Callable[[], dict[str, Any]], rank: int, directory: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=f"file://{directory / 'store'}")
    os.environ.update(GLOO_SOCKET_IFNAME=LOOPBACK, OMP_NUM_THREADS="1")
    model.network.ranks.join_ranks()
    (directory / f"found.{rank}").write_text(json.dumps(work()))


def sample_and_train() -> dict[str, Any]:
    engine = small_engine(20, zero_stage=3)
    begun = samples_of(engine)
    held = sum(weight.numel() for weight in engine.module.parameters())
    (part,), num_targets = batches(0, 4, 4)
    step = train_step(engine, [part], token_loss, 2 * num_targets, lambda loss, norm: True)
    return {"begun": begun, "held": held, "loss": step.loss, "trained": samples_of(engine)}


def test_sampling_gathers_shared_weights_once_and_gives_them_back(tmp_path: Path) -> None:
    engine = small_engine(20, batch_rows=4)
    expected = samples_of(engine)
    (part,), num_targets = batches(0, 4, 4)
    loss = train_step(engine, [part], token_loss, num_targets, lambda loss, norm: True).loss
    found = on_two_ranks(sample_and_train, tmp_path)
    assert [one["begun"] for one in found] == [expected, expected]
    assert [one["trained"] for one in found] == [samples_of(engine)] * 2 != [expected] * 2
    assert [one["loss"] for one in found] == pytest.approx([loss, loss], abs=1e-5)
    assert [one["held"] for one in found] == [0, 0]  # between two uses no rank holds a whole weight


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_sampling_leaves_training_as_it_was(zero_stage: int) -> None:
    undisturbed, engine = small_engine(20, zero_stage=zero_stage), small_engine(20, zero_stage=zero_stage)
    expected = train(undisturbed, range(4))
    steps = train(engine, range(2))
    samples_of(engine)
    assert steps + train(engine, range(2, 4)) == expected


CHECKPOINTED = [(precision, kind) for precision in ("fp32", "bf16") for kind in ("off", "selective", "full")]


def trained_as(precision: str, checkpointing: str, num_ranks: int, **changes: Any) -> tuple[list[float], list[Any]]:
    """Losses of two steps and the weights after them; each rank has its share of the same rows."""
    rows = 8 // num_ranks
    engine = small_engine(
        20, precision=precision, activation_checkpointing=checkpointing, micro_batch_rows=rows, **changes
    )
    losses = []
    for step in range(2):
        parts, num_targets = batches(step, 8, rows)
        own = parts[torch.distributed.get_rank()]
        losses.append(train_step(engine, [own], token_loss, num_targets, lambda loss, norm: True).loss)
    return losses, [weight.tolist() for weight in weights_of(engine)]


def assert_trained_alike(found: Any, expected: Any, precision: str) -> None:
    (losses, weights), (expected_losses, expected_weights) = found, expected
    # A sum in another order rounds otherwise: in bf16 to 8 bits, and Adam turns that into a part of its step of 1e-2.
    near = {"fp32": 1e-5, "bf16": 2e-3}[precision]
    assert losses == pytest.approx(expected_losses, abs=near)
    for weight, reference in zip(weights, expected_weights, strict=True):
        assert torch.allclose(torch.tensor(weight), torch.tensor(reference), atol=near)


@pytest.mark.parametrize(("precision", "checkpointing"), CHECKPOINTED)
def test_checkpointing_under_zero_3_changes_no_step(precision: str, checkpointing: str) -> None:
    plain = trained_as(precision, "off", num_ranks=1, zero_stage=0)
    assert_trained_alike(trained_as(precision, checkpointing, num_ranks=1, zero_stage=3), plain, precision)


def train_checkpointed() -> dict[str, Any]:
    return {" ".join(one): trained_as(*one, num_ranks=2, zero_stage=3) for one in CHECKPOINTED}


def test_checkpointing_under_zero_3_changes_no_step_of_two_ranks(tmp_path: Path) -> None:
    plain = {precision: trained_as(precision, "off", num_ranks=1, zero_stage=0) for precision in ("fp32", "bf16")}
    for found in on_two_ranks(train_checkpointed, tmp_path):
        for precision, checkpointing in CHECKPOINTED:
            one = found[f"{precision} {checkpointing}"]
            assert_trained_alike(one, plain[precision], precision)
            assert one == found[f"{precision} off"]  # what is computed again is the same
