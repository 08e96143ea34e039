"""The training loop that stages share: what they start from, resumable steps, the curves."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.network.checkpoint import read_config, read_tokenizer
from model.network.transformer import ModelConfig
from model.progress.bar import progress_bar
from model.text.tokenizer import Tokenizer
from model.training.states import load_state, save_state
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage

STATES = "resume"  # below a stage's scratch
TRAINING_LOSS = Plot("curves", "Training loss", "tokens", "loss", "tokens", "nats per token")

# Dense bf16 FLOPs per second, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "B200": 2250e12}


@dataclass
class Progress:
    """What a resumed run must know about its past; saved with the weights, as JSON."""

    counts: dict[str, int]  # used so far: tokens, and whatever else the stage counts
    notes: dict[str, Any] = field(default_factory=dict)  # the stage's own notes
    step: int = 0  # steps taken
    since_log: list[dict[str, float]] = field(default_factory=list)  # metrics of each step since the last log
    train: list[dict[str, float]] = field(default_factory=list)  # rows of plots/train.csv
    validation: list[dict[str, float]] = field(default_factory=list)  # a row per validation: step, tokens, each part


@dataclass(frozen=True)
class Taken:
    """The outcome of one step: its metrics, what it used, and what it learnt from."""

    found: dict[str, float]  # `loss`, `gradient_norm`, `learning_rate`, and whatever else the stage watches
    used: dict[str, int]  # what the step adds to Progress.counts
    sources: Callable[[], list[str]]  # names what it learnt from; called only if the step has failed


def read_base(base: Path, context: int, section: str) -> tuple[ModelConfig, Tokenizer]:
    """Return the model to start from, and its tokenizer.

    Raises ValueError when they don't belong together, or the model's context is shorter than that of `section`.
    """
    config = read_config(base)
    tokenizer = read_tokenizer(base, config)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"params.yaml: `{section}.context` is {context} tokens, and {base} was trained with "
            f"{config.max_position_embeddings}: set it to that or less"
        )
    return config, tokenizer


def digest_of(base: Path) -> str:
    """Return a digest of a checkpoint's weights."""
    digest = hashlib.sha256()
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def peak_flops(device: torch.device, precision: str) -> float:
    """Return a device's peak FLOPs per second: from its data sheet, or from a timed matrix product."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for model, flops in PEAK_FLOPS.items():
            if model in name:
                return flops
    size = 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the result
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def resume(stage: Stage[Any], engines: Mapping[str, Any], beginning: Progress) -> Progress:
    """Restore a stage's engines to where a stopped run left them, and return its progress, or else `beginning`."""
    found = load_state(engines, stage.scratch / STATES)
    return beginning if found is None else Progress(**found[1])


def run_steps(
    stage: Stage[Any],
    engines: Mapping[str, Any],
    progress: Progress,
    num_steps: int,
    take_step: Callable[[], Taken],
    *,
    validate: Callable[[], None] | None = None,
    validate_at: Collection[int] = (),
    after: Mapping[int, Callable[[], None]] | None = None,
    has_ended: Callable[[], bool] = lambda: False,
    flops_per_token: int | None = None,
) -> None:
    """Take a run's remaining steps; log, validate and save on the way, as the stage's parameters say.

    `validate` is also called before the first step, and after the steps in `validate_at`; `after` maps step numbers to
    what is called after that step; `has_ended`, asked after each step, ends the run early. Every count is also logged
    as a speed, per second of the steps alone;
    `flops_per_token`, of all engines, adds MFU.
    Raises ValueError when a metric of a step is not finite (`note_step`).
    """
    params = stage.params
    peak = 0.0
    if flops_per_token is not None:
        (device,) = {engine.device for engine in engines.values()}
        peak = peak_flops(device, params.precision) * torch.distributed.get_world_size()
    if validate and progress.step == 0:
        validate()
    seconds, before = 0.0, dict(progress.counts)
    description = stage.name if stage.rank == 0 else None
    with progress_bar(num_steps, description, "step", done=progress.step) as bar:
        while progress.step < num_steps and not has_ended():
            started = time.perf_counter()
            taken = take_step()
            seconds += time.perf_counter() - started
            note_step(stage, progress, taken)
            step, is_last = progress.step, progress.step == num_steps
            if step % params.log_every == 0 or is_last:
                speeds = {f"{name}_per_second": (progress.counts[name] - before[name]) / seconds for name in before}
                if flops_per_token is not None:
                    speeds["mfu"] = speeds["tokens_per_second"] * flops_per_token / peak
                log_training(stage, progress, speeds)
                shown = {name: f"{progress.train[-1][name]:.3f}" for name in taken.found if name != "learning_rate"}
                bar.set_postfix(shown, tokens_per_second=f"{speeds['tokens_per_second']:.0f}", refresh=False)
                seconds, before = 0.0, dict(progress.counts)
            if validate and (step % params.validate_every == 0 or step in validate_at or is_last):
                validate()
            if after and step in after:
                after[step]()
            if step % params.save_every == 0 or is_last or has_ended():
                save_state(engines, stage.scratch / STATES, step, asdict(progress))
            bar.update()


def note_step(stage: Stage[Any], progress: Progress, taken: Taken) -> None:
    """Count a step that was taken.

    Raises ValueError, naming the step, its metrics and what it learnt from, when one of the metrics is not finite.
    """
    progress.step += 1
    for name, count in taken.used.items():
        progress.counts[name] += count
    if not all(math.isfinite(value) for value in taken.found.values()):
        found = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in taken.found.items())
        raise ValueError(
            f"step {progress.step}: {found}; training has failed. Lower `{stage.section}.learning_rate`, or look at "
            f"what this step learnt from: {', '.join(taken.sources())}"
        )
    progress.since_log.append(taken.found)


def log_training(stage: Stage[Any], progress: Progress, speeds: Mapping[str, float]) -> None:
    """Log the mean metrics of the steps since the last log, and the last step's learning rate; clear `since_log`.

    They become a row of plots/train.csv, together with the step and the counts; speeds are only logged.
    """
    since_log, at = progress.since_log, {"step": progress.step, **progress.counts}
    means = {name: statistics.fmean(step[name] for step in since_log) for name in since_log[0]}
    figures = {**means, "learning_rate": since_log[-1]["learning_rate"]}
    since_log.clear()
    metrics = {f"train/{name}": value for name, value in {**figures, **speeds}.items()}
    stage.log(metrics, step=at["step"], tokens=at["tokens"])
    progress.train.append({**at, **figures})


def write_curves(
    stage: Stage[Any],
    train: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    part: str,
) -> None:
    """Write the losses into plots/train.csv and plots/validation.csv, and plot them for MLflow; only rank 0 writes.

    Each row has `step` and `tokens`. Rows of `train` have `loss`; rows of `validation` have the loss of each part of
    the held-out text, by the part's name. `part` says what the parts are, and names their column.
    """
    if stage.rank != 0:
        return
    import pandas

    losses = [
        {"tokens": row["tokens"], part: name, "loss": loss}
        for row in validation
        for name, loss in row.items()
        if name not in ("step", "tokens")
    ]
    by_part = replace(TRAINING_LOSS, title=f"Validation loss by {part}", series=part)
    stage.plot("train", pandas.DataFrame(train), TRAINING_LOSS)
    stage.plot("validation", pandas.DataFrame(losses), by_part)
    plot_losses(train, validation, stage.artifacts / "loss.png")


def plot_losses(train: Sequence[Mapping[str, float]], validation: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot all losses against tokens."""
    with picture(path, 8, 5) as axes:
        axes.plot([row["tokens"] for row in train], [row["loss"] for row in train], "k", label="train")
        tokens = [row["tokens"] for row in validation]
        for name in [name for name in validation[-1] if name not in ("step", "tokens")]:
            axes.plot(tokens, [row[name] for row in validation], label=name)
        axes.set(xlabel="tokens", ylabel="loss, nats per token")
        axes.legend()
