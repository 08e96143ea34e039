import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_alone, small_engine
from stages import stage_here
from test_engine import batches, weights_of

from model.training.engine import token_loss, train_step
from tasks.learning.loop import Progress, Taken, log_training, note_step, peak_flops, resume, run_steps
from tasks.running.params import Section
from tasks.running.stage import Stage


def test_peak_is_measured_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32") < 1e14
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12


def test_what_is_logged_is_the_mean_of_the_steps_since_the_last_time_but_the_newest_rate() -> None:
    logged: list[Any] = []

    class Recorder:
        def log(self, metrics: dict[str, float], **at: int) -> None:
            logged.append((metrics, at))

    steps = [
        {"loss": 3.0, "accuracy": 0.5, "learning_rate": 0.1},
        {"loss": 1.0, "accuracy": 1.0, "learning_rate": 0.2},
    ]
    recorder: Any = Recorder()
    progress = Progress({"pairs": 4, "tokens": 90}, step=7, since_log=steps)
    log_training(recorder, progress, {"mfu": 0.4})
    (row,) = progress.train
    assert row == {"step": 7, "pairs": 4, "tokens": 90, "loss": 2.0, "accuracy": 0.75, "learning_rate": 0.2}
    found = {"train/loss": 2.0, "train/accuracy": 0.75, "train/learning_rate": 0.2, "train/mfu": 0.4}
    assert logged == [(found, {"step": 7, "tokens": 90})]
    assert progress.since_log == []


# --- the loop, with two engines ---


class Watched(Section):
    log_every: int = 3
    validate_every: int = 4
    save_every: int = 2
    precision: str = "fp32"


def run_two(fresh: bool = True, stop_before: int = 0) -> tuple[Stage[Watched], Progress, list[torch.Tensor]]:
    """Seven steps of two engines, of which a run may be stopped; what it noted, and the weights at the end."""
    join_alone()
    stage = stage_here("ppo@v1", Watched(), fresh)
    engines = {"policy": small_engine(20), "value": small_engine(12, seed=2)}
    progress = resume(stage, engines, Progress({"prompts": 0, "tokens": 0}, {"validated": [], "middle": []}))

    def take_step() -> Taken:
        if progress.step + 1 == stop_before:
            raise KeyboardInterrupt
        micro_batches, num_targets = batches(progress.step, 8, 4)
        policy, value = (
            train_step(engine, micro_batches, token_loss, num_targets, lambda loss, norm: True)
            for engine in engines.values()
        )
        return Taken(
            {"loss": policy.loss, "value_loss": value.loss, "learning_rate": policy.learning_rate},
            {"prompts": 1, "tokens": 128},
            list,
        )

    def note(name: str) -> None:
        progress.notes[name].append(progress.step)

    watching: dict[str, Any] = {"validate": lambda: note("validated"), "after": {5: lambda: note("middle")}}
    run_steps(stage, engines, progress, 7, take_step, flops_per_token=10, **watching)
    return stage, progress, [weight for engine in engines.values() for weight in weights_of(engine)]


def test_the_loop_logs_validates_and_saves_as_the_stage_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage, progress, _ = run_two()
    assert [(row["step"], row["prompts"], row["tokens"]) for row in progress.train] == [
        (3, 3, 3 * 128), (6, 6, 6 * 128), (7, 7, 7 * 128)
    ]  # fmt: skip
    assert list(progress.train[0]) == ["step", "prompts", "tokens", "loss", "value_loss", "learning_rate"]
    assert progress.notes == {"validated": [0, 4, 7], "middle": [5]}
    assert sorted(path.name for path in (stage.scratch / "resume").iterdir()) == ["step-6", "step-7"]
    lines = [json.loads(line) for line in (stage.record / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(3, 384), (6, 768), (7, 896)]
    for metrics in (line["metrics"] for line in lines):
        assert metrics["train/tokens_per_second"] == pytest.approx(128 * metrics["train/prompts_per_second"])
        assert metrics["train/mfu"] > 0


def test_a_loop_that_was_stopped_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, expected, weights = run_two()
    with pytest.raises(KeyboardInterrupt):
        run_two(stop_before=6)
    _, progress, again = run_two(fresh=False)
    assert progress == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize("failed", ["loss", "gradient_norm"])
def test_a_step_that_found_no_number_is_named_with_what_it_learnt_from(failed: str) -> None:
    stage: Any = Stage("sft@v1", Watched(), 1, None, Path(), Path(), Path())  # type: ignore[arg-type]
    progress = Progress({"tokens": 30}, step=4)
    found = {"loss": 2.5, "gradient_norm": 0.5, "learning_rate": 0.001}
    note_step(stage, progress, Taken(found, {"tokens": 7}, list))
    assert (progress.step, progress.counts, progress.since_log) == (5, {"tokens": 37}, [found])
    text = {"loss": "loss nan, gradient norm 0.5", "gradient_norm": "loss 2.5, gradient norm nan"}[failed]
    with pytest.raises(ValueError, match=rf"step 6: {text}, .*Lower `sft\.learning_rate`.* learnt from: own a, own b"):
        note_step(stage, progress, Taken({**found, failed: math.nan}, {"tokens": 1}, lambda: ["own a", "own b"]))
