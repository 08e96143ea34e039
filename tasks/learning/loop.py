"""What the stages that train share: what they start from, how fast the device could be, a bar of steps, the curves."""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.network.checkpoint import read_config, read_tokenizer
from model.network.transformer import ModelConfig
from model.text.tokenizer import Tokenizer
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage

TRAINING_LOSS = Plot("curves", "Training loss", "tokens", "loss", "tokens", "nats per token")
# Dense bf16 products a second; NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "B200": 2250e12}


def read_base(base: Path, context: int, section: str) -> tuple[ModelConfig, Tokenizer]:
    """Return the model to start from, and its tokenizer.

    Raises ValueError when they don't belong together, or the model has fewer positions than `section`'s context.
    """
    config = read_config(base)
    tokenizer = read_tokenizer(base, config)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"params.yaml: `{section}.context` is {context} tokens, and {base} was trained with "
            f"{config.max_position_embeddings}: set that or less"
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
    """Return the operations a second that a device could do at best: its data sheet's, or a timed product's."""
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


def progress_bar(stage: Stage[Any], step: int, num_steps: int) -> Any:
    """Return a bar of steps with the time left; in a log file it moves rarely."""
    rarely = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=num_steps, initial=step, desc=stage.name, unit="step", mininterval=rarely, disable=stage.rank != 0
    )


def log_training(
    stage: Stage[Any], since_log: list[dict[str, float]], at: Mapping[str, int], speeds: Mapping[str, float]
) -> dict[str, float]:
    """Record the means of what the steps since the last time found, and the last one's learning rate; forget them.

    Each step has `loss`, `gradient_norm`, `learning_rate`, and what else its stage watches; `at` says where training
    is: `step`, `tokens` and the like. Returns a row of plots/train.csv.
    """
    means = {name: statistics.fmean(step[name] for step in since_log) for name in since_log[0]}
    figures = {**means, "learning_rate": since_log[-1]["learning_rate"]}
    since_log.clear()
    metrics = {f"train/{name}": value for name, value in {**figures, **speeds}.items()}
    stage.log(metrics, step=at["step"], tokens=at["tokens"])
    return {**at, **figures}


def write_curves(
    stage: Stage[Any],
    train: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    part: str,
) -> None:
    """Write the losses into plots/train.csv and plots/validation.csv, and plot them for MLflow; only rank 0 writes.

    Each row has `step` and `tokens`. One of `train` has `loss`, one of `validation` the loss of each part of the
    held-out text under the part's name; `part` says what the parts are: the name of their column.
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
