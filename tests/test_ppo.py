from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import TRAINED, join_alone, train_tokenizer
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from stages import Workspace, stage_here
from test_pretrain import write_stream
from test_rejection_sampling import PROMPTS, asked, write_chat, write_models, write_prompts

from model.network.checkpoint import open_checkpoint
from model.network.packing import batch_of_rows
from model.rlhf.rollouts import Rollout, padded
from tasks.judging.calibration import Line
from tasks.judging.ranking import Reward, Scales, reward_of
from tasks.learning.stream import read_stream
from tasks.ppo.__main__ import prompts_of, run
from tasks.ppo.alarms import Alarms, check_alarms
from tasks.ppo.experience import Answer, Measured, Weighing, figures_of, plan_batches, weigh
from tasks.ppo.training import Params
from tasks.reading.prompts import KINDS, Prompt
from tasks.reading.shares import Asked
from tasks.running.files import read_lines
from tasks.running.params import parse_section
from tasks.running.stage import Stage

EOS = 2


# --- a small world: a chat model that ends its answers now and then, reward models, prompts ---


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ppo-models")
    write_models(root, "v5")
    return root


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        **TRAINED,
        "final_learning_rate_ratio": 1.0, "learning_rate": 3e-3, "value_learning_rate": 3e-3, "warmup_steps": 2,
        "batch_rows": 8, "micro_batch_rows": 4,
        "rounds": {"v5": {"init_from": "chat"}},
        "prompts": {kind: f"prompts/{kind}.jsonl" for kind in KINDS},
        "max_prompts": {"helpfulness": 100, "safety": 100}, "num_held_out_prompts": {"helpfulness": 4, "safety": 2},
        "num_rounds": 5, "num_iterations": 6, "num_prompts": 16, "epochs": 1, "value_warmup_iterations": 1,
        "clip": 0.2, "value_clip": 0.2, "whitening": "branch",
        "kl_coefficient": 0.01, "missing_eos_penalty": 1.0, "max_log_odds": 10.0,
        "text": "stream", "text_weight": 0.0, "text_rows": 4, "discount": 1.0, "decay": 0.95,
        "threshold_precision": 0.89, "max_new_tokens": 12, "max_rows": 8,
        "tokens_at_once": 512, "alarms": {"max_kl": 1000.0, "min_entropy": 0.0, "max_length_ratio": 100.0},
        "validate_every": 2, "patience": 10, "num_shown": 1, "log_every": 1, "save_every": 1,
        "max_shard_bytes": 10**9,
    }  # fmt: skip
    return {**values, **changes}


SECTIONS = {
    "rounds": {
        "v5": {
            "newest": "chat", "earlier": "early", "batches": "pairs", "samples": "data/seeds/none",
            "distil_from": "data/seeds/none",
            "ghost_attention": "data/seeds/none",
            "context_distillation": "data/seeds/none",
        }
    },
    "evaluate": {"root": "evaluation", "prompts": ["asked.jsonl"]},
}  # fmt: skip


def write_world(root: Path, models: Path) -> None:
    shutil.copytree(models / "chat", root / "chat")
    shutil.copytree(models / "data", root / "data")
    for kind, rows in PROMPTS.items():
        many = [{**asked(number, kind), "id": f"{kind[0]}{number}"} for number in range(5 * len(rows))]
        write_prompts(root / f"prompts/{kind}.jsonl", many)
    write_prompts(root / "evaluation/asked.jsonl", [{**asked(99), "id": "e"}])


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    join_alone()
    write_world(tmp_path, models)
    with Path("params.yaml").open("w") as file:
        YAML().dump(SECTIONS, file)
    return tmp_path


def stage_of(fresh: bool = True, **changes: Any) -> Stage[Params]:
    return stage_here("ppo@v5", parse_section(Params, {"ppo": values_of(**changes)}, "ppo"), fresh)


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logged() -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path("record/metrics.jsonl").read_text().splitlines()]
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line["metrics"])
    return [steps[number] for number in sorted(steps)]


# --- the whole stage ---


def test_it_learns_keeps_the_best_policy_and_leaves_what_it_reads_as_it_was(place: Path, models: Path) -> None:
    figures = run(stage_of())
    assert figures["iterations"] == 6
    assert figures["responses"] == 6 * 16
    assert all(math.isfinite(value) for value in figures.values())
    best = int(figures["best_iteration"])
    objectives = {n: step["validation/objective"] for n, step in enumerate(logged()) if "validation/objective" in step}
    assert sorted(objectives) == [0, 2, 4, 6]
    assert best == max(objectives, key=lambda number: (objectives[number], -number))
    assert json.loads(Path("out/training.json").read_text())["step"] == best
    assert figures["steps"] == (6 - 1) * 2
    before, after = weights_in(models / "chat"), weights_in(Path("out"))
    assert all(torch.equal(before[name], after[name]) == (best == 0) for name in before)
    for name in ("chat", "data/reward_helpfulness/v5", "data/reward_safety/v5"):
        assert (place / name / "model.safetensors").read_bytes() == (models / name / "model.safetensors").read_bytes()
    samples = read_lines(Path("out/samples.jsonl"))
    assert [(row["step"], row["kind"]) for row in samples] == [(best, "helpfulness"), (best, "safety")]


def test_before_the_policy_learns_it_is_the_reference_and_ratios_are_exactly_1(place: Path) -> None:
    run(stage_of())
    first, second, *later = logged()[1:]
    # the first iteration only warms the value model up, so two of them sample from the starting policy
    for step in (first, second):
        assert step["train/kl"] == 0
        assert step["train/kl_k3"] == 0
    assert first["train/ratio"] == 1
    assert first["train/learning_rate"] == 0
    assert any(step["train/kl_k3"] > 0 for step in later)
    assert {"seconds/sampling", "seconds/measuring", "seconds/training"} <= set(first)


def test_the_policy_learns_what_is_rewarded(place: Path) -> None:
    figures = run(stage_of(num_iterations=20, kl_coefficient=0.0, validate_every=4))
    assert figures["validation/gain"] > 0.2


def write_text(directory: Path, num_tokens: int) -> None:
    """A stream within the small model's vocabulary."""
    write_stream(directory, num_tokens)
    for path in directory.glob("train-*.npy"):
        np.save(path, np.minimum(np.load(path), 289))


def text_loss(directory: Path) -> float:
    model, _ = open_checkpoint(directory, "fp32", torch.device("cpu"))
    text = read_stream(Path("stream"))[0]
    batch = batch_of_rows(text.tokens, text.starts, 0, 8, 64, torch.device("cpu"))
    with torch.no_grad():
        return float(model(batch.ids, batch.documents, batch.targets).sum()) / batch.num_targets


def test_pretraining_text_can_be_learnt_beside(place: Path) -> None:
    write_text(Path("stream"), 4000)
    before = text_loss(Path("chat"))
    run(stage_of(learning_rate=1e-4, num_iterations=8, validate_every=8, text_weight=0.0))
    without = text_loss(Path("out"))
    run(stage_of(learning_rate=1e-4, num_iterations=8, validate_every=8, text_weight=50.0))
    assert text_loss(Path("out")) < min(before, without) - 0.005


def test_a_text_too_short_for_a_step_is_refused(place: Path) -> None:
    write_text(Path("stream"), 150)
    with pytest.raises(ValueError, match=r"stream has \d+ tokens, too few for a step of `ppo.text_rows` 4 rows of 64"):
        run(stage_of(text_weight=1.0))


def test_training_ends_when_the_best_policy_is_old(place: Path) -> None:
    # a rate so small that no objective changes: the first policy stays the best one
    figures = run(stage_of(learning_rate=1e-12, patience=2))
    assert figures["best_iteration"] == 0
    assert figures["iterations"] == 4
    assert figures["steps"] == (4 - 1) * 2


def test_an_interrupted_run_that_had_ended_does_not_begin_again(place: Path) -> None:
    figures = run(stage_of(learning_rate=1e-12, patience=2))
    again = stage_of(fresh=False, learning_rate=1e-12, patience=2)
    assert run(again) == figures


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 12}, r"num_prompts 12 is not a multiple of batch_rows 8"),
        ({"validate_every": 3, "save_every": 2}, r"validate_every 3 is not a multiple of save_every 2"),
        ({"value_warmup_iterations": 6}, r"value_warmup_iterations 6 leaves none of num_iterations 6"),
        ({"text_weight": 1.0, "text_rows": 3}, r"text_rows 3 do not divide among the 2 micro batches of a step"),
        ({"num_held_out_prompts": {"helpfulness": 0, "safety": 0}}, r"num_held_out_prompts has none of any kind"),
        ({"kl_coefficient": -0.1}, r"`ppo.kl_coefficient` is -0.1"),
        ({"kl_coefficient": 2}, r"`ppo.kl_coefficient` is 2"),
        ({"clip": 0}, r"`ppo.clip` is 0"),
        ({"clip": 1}, r"`ppo.clip` is 1"),
        ({"decay": 1.5}, r"`ppo.decay` is 1.5"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_section(Params, {"ppo": values_of(**changes)}, "ppo")


def test_a_batch_that_does_not_divide_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`batch_rows` 8 is not a multiple of `micro_batch_rows` 3 x 1 ranks"):
        run(stage_of(micro_batch_rows=3))


def test_a_round_without_an_entry_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`ppo.rounds` has no `v5`: it has ppo@v6"):
        run(stage_of(rounds={"v6": {"init_from": "chat"}}))


def test_without_prompts_there_is_nothing_to_ask(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`ppo.max_prompts` is 0 for each kind"):
        run(stage_of(max_prompts={"helpfulness": 0, "safety": 0}))


def test_prompts_that_leave_no_room_are_refused(place: Path) -> None:
    long = [{**asked(number), "messages": [{"role": "user", "content": "the llama " * 60}]} for number in range(40)]
    write_prompts(Path("prompts/helpfulness.jsonl"), long)
    with pytest.raises(ValueError, match=r"no helpfulness prompt is left: .* leave no room for an answer in the mod"):
        run(stage_of())


def test_a_reward_model_of_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(train_tokenizer(other, ["quite other words"]), "data/reward_safety/v5/tokenizer.model")
    with pytest.raises(ValueError, match=r"is another tokenizer than .*: a reward model reads a chat model's"):
        run(stage_of())


def test_a_value_model_of_another_shape_is_refused(place: Path) -> None:
    path = Path("data/reward_helpfulness/v5/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"has shape \(88, 32\), but config.json makes it \(64, 32\)"):
        run(stage_of())


def test_a_reward_that_is_not_finite_is_refused(place: Path) -> None:
    path = Path("data/reward_safety/v5/model.safetensors")
    weights = load_file(path)
    weights["score.weight"][:] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"data/reward_safety/v5 scores an answer to prompt .* nan: the reward model"):
        run(stage_of())


def test_a_policy_that_answers_nothing_is_stopped(place: Path, models: Path) -> None:
    shutil.rmtree("chat")
    write_chat(Path("chat"), models / "tokenizer.model", ends=2000.0)
    with pytest.raises(ValueError, match=r"iteration 1: every response is empty\. The policy may be over-optimised"):
        run(stage_of())


# --- alarms ---

FINE = {"kl": 3.0, "entropy": 1.0, "length": 10.0, "empty": 0.0}


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"kl": 5.5}, r"the KL from the starting policy is 5.50 nats a response, above `ppo.alarms.max_kl` 5"),
        ({"entropy": 0.1}, r"the entropy is 0.100 nats a token, below `ppo.alarms.min_entropy` 0.2"),
        ({"length": 20.5}, r"responses have 20.5 tokens, where the first had 10.0, beyond .*max_length_ratio` 2"),
        ({"length": 4.9}, r"responses have 4.9 tokens, where the first had 10.0"),
        ({"empty": 1.0}, r"every response is empty"),
        ({"kl": 9.0, "entropy": 0.0}, r"is 9.00 nats a response, above .*; the entropy is 0.000"),
    ],
)
def test_alarms_say_what_they_saw_and_which_policy_is_kept(seen: dict[str, float], message: str) -> None:
    alarms = Alarms(max_kl=5, min_entropy=0.2, max_length_ratio=2)
    check_alarms(alarms, 7, FINE, 10.0, (5, Path("best-5")))
    check_alarms(alarms, 7, {**FINE, "kl": 5.0, "entropy": 0.2, "length": 20.0}, 10.0, (5, Path("best-5")))
    with pytest.raises(ValueError, match=message) as caught:
        check_alarms(alarms, 7, {**FINE, **seen}, 10.0, (5, Path("best-5")))
    assert str(caught.value).startswith("iteration 8: ")
    assert "of iteration 5, is kept in best-5; `ppo.num_iterations` 5 would end with it" in str(caught.value)


def test_an_alarm_keeps_the_last_good_policy(place: Path) -> None:
    tight = {"max_kl": 0.02, "min_entropy": 0.0, "max_length_ratio": 100.0}
    with pytest.raises(ValueError, match=r"iteration \d+: the KL from the starting policy is .* is kept in scr"):
        run(stage_of(alarms=tight, learning_rate=1e-2, num_iterations=20))
    assert list(Path("scratch").glob("best-*/model.safetensors"))


# --- what is learnt from ---

SCALES = Scales(Line(1.0, 0.0), Line(1.0, 0.0), threshold=0.5)


def answer(length: int, value: float, finished: bool = True, prompt: list[int] | None = None) -> Answer:
    rollout = Rollout(prompt or [1, 5], [7] * (length - 1) + [EOS if finished else 8])
    about = Prompt("p", "factual", [{"role": "user", "content": "?"}], None, None, None)
    return Answer("helpfulness", about, rollout, finished, -1.0, value, 0.0, Reward("helpfulness", value))


def measured_of(answers: list[Answer], value: float = 0.0, log_ratio: float = 0.0) -> Measured:
    lengths = [len(each.rollout.response) for each in answers]
    sampled = padded([[-1.0] * length for length in lengths])
    is_token = sampled < 0
    return Measured(sampled, (sampled - log_ratio) * is_token, value * is_token, is_token)


PLAIN = Weighing(whitening="batch", kl_coefficient=0.0, missing_eos_penalty=1.5, discount=1.0, decay=1.0)


@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
@pytest.mark.parametrize(("safety", "unsafe"), [(-0.1, True), (0.0, False), (0.1, False)])
def test_the_safety_model_counts_where_the_prompt_is_tagged_or_the_answer_is_called_unsafe(
    kind: Any, safety: float, unsafe: bool
) -> None:
    reward = reward_of(kind, 3.0, safety, 0.0, SCALES, 0.0)  # a probability below, at and above the threshold of 0.5
    assert reward == (("safety", safety) if kind == "safety" or unsafe else ("helpfulness", 3.0))


def test_advantages_are_whitened_and_returns_are_not() -> None:
    answers = [answer(2, 1.0), answer(4, -1.0)]
    known, _ = weigh(answers, measured_of(answers, value=0.25), PLAIN)
    assert known[0].returns.tolist() == [1, 1]  # the score, whitened: 1 and -1
    assert known[1].returns.tolist() == [-1, -1, -1, -1]
    advantages = torch.cat([own.advantages for own in known])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert [len(own.log_probabilities) for own in known] == [2, 4]


def test_a_response_without_its_end_loses_the_penalty_and_an_eos_in_the_prompt_is_no_end() -> None:
    turns = [1, 5, EOS, 1, 6]
    answers = [answer(3, 1.0, True, turns), answer(3, -1.0, False, turns), answer(3, 1.0), answer(3, -1.0)]
    known, _ = weigh(answers, measured_of(answers), PLAIN)
    assert [own.returns.tolist() for own in known] == [[1] * 3, [-2.5] * 3, [1] * 3, [-1] * 3]


def test_rewards_are_whitened_over_the_batch_or_over_each_models_responses() -> None:
    values, branches = (1.0, 3.0, 40.0, 60.0), ("helpfulness", "helpfulness", "safety", "safety")
    answers = [
        answer(1, value)._replace(reward=Reward(branch, value))  # type: ignore[arg-type]
        for value, branch in zip(values, branches, strict=True)
    ]
    known, _ = weigh(answers, measured_of(answers), PLAIN._replace(whitening="branch"))
    assert [float(own.returns) for own in known] == pytest.approx([-1, 1, -1, 1])
    known, _ = weigh(answers, measured_of(answers), PLAIN)
    deviation = ((25**2 + 23**2 + 14**2 + 34**2) / 4) ** 0.5
    assert [float(own.returns) for own in known] == pytest.approx([n / deviation for n in (-25, -23, 14, 34)])


def test_equal_rewards_teach_nothing_but_to_stay() -> None:
    answers = [answer(2, 0.0), answer(3, 0.0)]
    known, _ = weigh(answers, measured_of(answers), PLAIN)
    assert all(not own.advantages.any() and not own.returns.any() for own in known)
    away, _ = weigh(answers, measured_of(answers, log_ratio=1.0), PLAIN._replace(kl_coefficient=0.1))
    assert away[0].returns.tolist() == pytest.approx([-0.2, -0.1])


def test_what_is_watched_of_samples() -> None:
    answers = [answer(1, 2.0), answer(3, 0.0, finished=False)]
    seen = figures_of(answers, measured_of(answers, log_ratio=0.5))
    assert seen["kl"] == pytest.approx((0.5 + 1.5) / 2)
    assert seen["kl_k3"] == pytest.approx(2 * (math.exp(-0.5) - 0.5))
    assert (seen["entropy"], seen["length"], seen["finished"], seen["empty"]) == (1, 2, 0.5, 0.5)
    assert (seen["reward"], seen["helpfulness/reward"], seen["safety/reward"], seen["safety_branch"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("batch_rows", [4, 8, 24])
def test_each_response_is_learnt_once_an_epoch(batch_rows: int) -> None:
    rollouts = [Rollout([1] * (1 + number % 5), [EOS]) for number in range(24)]
    steps = plan_batches(rollouts, batch_rows, 4, (1, 2))
    assert all(len(micro) == 4 for step in steps for micro in step)
    assert all(len(step) == batch_rows // 4 for step in steps)
    assert sorted(number for step in steps for micro in step for number in micro) == list(range(24))
    assert steps != plan_batches(rollouts, batch_rows, 4, (1, 3))
    assert steps == plan_batches(rollouts, batch_rows, 4, (1, 2))


def test_prompts_come_in_passes_and_none_comes_twice_before_all_have() -> None:
    about = Prompt("p", "factual", [], None, None, None)
    prompts = [Asked("helpfulness", about._replace(id=str(number))) for number in range(10)]
    drawn = [each.prompt.id for number in range(10) for each in prompts_of(prompts, number, 4, seed=1)]
    assert len(drawn) == 40
    passes = [drawn[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(own, key=int) == [str(number) for number in range(10)] for own in passes)
    assert passes[0] != passes[1]


# --- kills and ranks ---

DVC_STAGE = f"""\
stages:
  ppo:
    foreach: ${{ppo.rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch ppo ${{key}}
      deps:
      - ${{item.init_from}}
      - data/reward_helpfulness/${{key}}
      - data/reward_safety/${{key}}
      params:
      - ppo.num_iterations
      outs:
      - data/ppo/${{key}}
"""


def workspace(root: Path, models: Path, num_ranks: int = 1, **changes: Any) -> Workspace:
    write_world(root, models)
    write_text(root / "stream", 4000)
    return Workspace(root, "ppo v5", DVC_STAGE, num_ranks=num_ranks, ppo=values_of(**changes), **SECTIONS)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path, models: Path) -> None:
    whole = workspace(tmp_path / "whole", models)
    figures = whole.finish()
    killed = workspace(tmp_path / "killed", models)
    killed.kill_at_random(20, 4.0, random.Random(1), whole.files)
    assert killed.finish() == figures
    assert killed.files == whole.files


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_learn_what_one_does(zero_stage: int, tmp_path: Path, models: Path) -> None:
    values = {"num_iterations": 3, "validate_every": 3, "zero_stage": zero_stage, "text_weight": 0.1}
    alone = workspace(tmp_path / "alone", models, **values, micro_batch_rows=4).finish()
    shared = workspace(tmp_path / "shared", models, num_ranks=2, **values, micro_batch_rows=4).finish()
    assert shared == pytest.approx(alone, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_an_optimiser_that_lives_beside_the_device_learns_the_same(tmp_path: Path, models: Path) -> None:
    values = {"num_iterations": 3, "validate_every": 3, "zero_stage": 2}
    found = [workspace(tmp_path / offload, models, **values, offload=offload).finish() for offload in ("none", "cpu")]
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-3)
