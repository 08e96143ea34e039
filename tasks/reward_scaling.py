"""Study the accuracy of reward models against amount of data and model size (Llama 2, section 3.2.2, figure 6).

A study off the main path: no other stage reads it, and it runs only by name, `dvc repro studies/dvc.yaml`. Models are
trained as in stage `reward_helpfulness` or `reward_safety`, with that stage's parameters, on a random share of its
pairs. The smaller ones are the same chat model with only its first layers kept. Every training is done once per seed,
which draws the pairs, their order and the head; intervals are Student's 95% intervals over the seeds. A run that was
stopped resumes with the training that it was at.

Reads the chat model and the preferences. Writes runs.csv (one line per training) and plots/scaling.csv.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from model.network.checkpoint import load_weights
from model.network.ranks import join_ranks
from model.network.transformer import ModelConfig, num_parameters
from model.progress.bar import progress_bar
from model.scoring.reward import RewardModel, draw_heads
from model.training.engine import build_model, start_engine
from tasks.judging.intervals import student_quantile
from tasks.judging.scores import higher
from tasks.learning import reward
from tasks.learning.loop import Progress, note_step, read_base
from tasks.running.files import write_json
from tasks.running.params import Section, parse_section, read_params
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage, start

SCALING = Plot(
    kind="curves",
    title="Reward model, accuracy against amount of data and size",
    x="pairs",
    y="accuracy",
    x_label="pairs learnt from",
    y_label="accuracy on held-out pairs",
    series="model",
)


class Params(Section):
    """Which models are trained on how much data."""

    kind: Literal["helpfulness", "safety"] = Field(description="the kind of reward model whose training is studied")
    init_from: str = Field(min_length=1, description="Hugging Face Llama directory of the chat model to start from")
    preferences: str = Field(min_length=1, description="directory of preferences, data/preferences/<round>")
    num_layers: list[int] = Field(min_length=1, description="model sizes: how many of the first layers are kept")
    shares: list[float] = Field(min_length=1, description="amounts of data: shares of the pairs, above 0, at most 1")
    num_seeds: int = Field(gt=1, description="trainings of each size on each amount of data")


@dataclass(frozen=True)
class Base:
    """What all trainings have in common; `stage` has the parameters of the studied stage."""

    stage: Stage[reward.Params]
    directory: Path
    config: ModelConfig
    data: reward.Data


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train all models, report."""
    params = stage.params
    join_ranks()
    base = read_study(stage)
    check_study(params, base.config, len(base.data.train))
    trainings = [
        (num_layers, amount_of(share, len(base.data.train)), stage.seed + number)
        for number in range(params.num_seeds)
        for num_layers in params.num_layers
        for share in params.shares
    ]
    done = finished_before(stage)
    description = stage.name if stage.rank == 0 else None
    with progress_bar(len(trainings), description, "training", done=len(done)) as bar:
        for num_layers, num_pairs, seed in trainings[len(done) :]:
            accuracy = accuracy_of(train(base, num_layers, num_pairs, seed))
            done.append({"layers": num_layers, "pairs": num_pairs, "seed": seed, "accuracy": accuracy})
            if stage.rank == 0:
                write_json(stage.scratch / "done.json", done)
            bar.update()
    return report(stage, base.config, done)


def read_study(stage: Stage[Params]) -> Base:
    """Read what the studied stage would read, with its parameters."""
    params = stage.params
    section = f"reward_{params.kind}"
    studied = parse_section(reward.Params, read_params(), section)
    config, tokenizer = read_base(Path(params.init_from), studied.context, section)
    data = reward.read_data(Path(params.preferences), params.kind, studied, tokenizer, stage.seed, section)
    own = [(preference, pair) for preference, pair in data.validation if preference.kind == params.kind]
    if not own:
        raise ValueError(f"{params.preferences}/validation.jsonl holds no {params.kind} pair: nothing to measure on")
    copy = replace(stage, name=section, params=studied)  # type: ignore[arg-type]
    return Base(copy, Path(params.init_from), config, replace(data, validation=own))  # type: ignore[arg-type]


def check_study(params: Params, config: ModelConfig, num_pairs: int) -> None:
    """Raise ValueError for more layers than the model has, for shares of less than one pair, and for repetitions."""
    for num_layers in params.num_layers:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(
                f"params.yaml: `reward_scaling.num_layers` has {num_layers}, but {params.init_from} has "
                f"{config.num_hidden_layers} layers: keep between 1 and that many"
            )
    for share in params.shares:
        if not 0 < share <= 1 or amount_of(share, num_pairs) == 0:
            raise ValueError(
                f"params.yaml: `reward_scaling.shares` has {share}, which is not a share of {num_pairs} pairs: "
                "set it above 0 and at most 1"
            )
    amounts = [amount_of(share, num_pairs) for share in params.shares]
    for name, values in (("num_layers", params.num_layers), ("shares", amounts)):
        if len(set(values)) < len(values):
            raise ValueError(
                f"params.yaml: `reward_scaling.{name}` has one model twice ({', '.join(map(str, values))}): its "
                "repetition would count as another seed"
            )


def amount_of(share: float, num_pairs: int) -> int:
    """Return how many pairs a share amounts to."""
    return round(share * num_pairs)


def finished_before(stage: Stage[Params]) -> list[dict[str, Any]]:
    """Return the trainings that a stopped run had finished; rank 0 reads them."""
    path = stage.scratch / "done.json"
    done = [json.loads(path.read_text(encoding="utf-8")) if stage.rank == 0 and path.exists() else []]
    torch.distributed.broadcast_object_list(done, src=0)
    return list(done[0])


# --- one training ---


def train(base: Base, num_layers: int, num_pairs: int, seed: int) -> list[tuple[float, float]]:
    """Train a model of this many layers on this many pairs; return its scores of both answers of each held-out pair."""
    params = base.stage.params
    drawn = np.random.default_rng((seed, 0)).permutation(len(base.data.train))[:num_pairs]
    data = replace(base.data, train=[base.data.train[number] for number in sorted(drawn.tolist())])
    steps = reward.plan_steps(num_pairs, params, seed)
    model = build_model(partial(RewardModel, tells_safety=params.safety_loss_weight > 0), base.config, params)
    load_weights(model, base.directory, part="model")
    draw_heads(model, seed)
    del model.model.layers[num_layers:]
    engine, progress = start_engine(model, params, len(steps)), Progress(dict(reward.FIRST_COUNTS))
    training = reward.Training(base.stage, engine, data, steps, progress)
    for _ in steps:
        note_step(base.stage, progress, reward.take_step(training))
    return reward.held_out_scores(training)


def accuracy_of(scores: Sequence[tuple[float, float]]) -> float:
    """Return the share of pairs whose chosen answer scores higher; a tie counts half."""
    import pandas

    table = pandas.DataFrame(scores, columns=["chosen", "rejected"])
    return float(higher(table["chosen"], table["rejected"]).mean())


# --- the report ---


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of accuracies, and its 95% interval by Student's t, clipped to 0 and 1."""
    mean, count = statistics.fmean(values), len(values)
    reach = student_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)


def report(stage: Stage[Params], config: ModelConfig, done: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Write trainings, curves and the picture; return the accuracies."""
    import pandas

    runs = pandas.DataFrame(done)
    figures: dict[str, float] = {"trainings": len(runs)}
    rows = []
    for num_layers, num_pairs in sorted({(each["layers"], each["pairs"]) for each in done}):
        group = runs[(runs["layers"] == num_layers) & (runs["pairs"] == num_pairs)]
        mean, low, high = interval(group["accuracy"].tolist())
        place = f"layers_{num_layers}/pairs_{num_pairs}/accuracy"
        figures |= {place: mean, f"{place}/low": low, f"{place}/high": high}
        without_head = config.model_copy(update={"num_hidden_layers": num_layers, "tie_word_embeddings": True})
        parameters = num_parameters(without_head) + config.hidden_size  # the scalar's
        size = f"{num_layers} layer{'s' * (num_layers > 1)}"
        rows.append(
            {"model": size, "pairs": num_pairs, "accuracy": mean, "low": low, "high": high, "parameters": parameters}
        )
    if stage.rank == 0:
        table = pandas.DataFrame(rows)
        runs.to_csv(stage.output / "runs.csv", index=False)
        stage.plot("scaling", table, SCALING)
        table.to_csv(stage.tables / "scaling.csv", index=False)
        plot_scaling(table, stage.params.kind, stage.artifacts / "scaling.png")
    return figures


def plot_scaling(table: Any, kind: str, path: Path) -> None:
    """Plot accuracy against the number of pairs, a curve for each size."""
    with picture(path, 7, 4.5) as axes:
        for model, points in table.groupby("model", sort=False):
            reach = [points["accuracy"] - points["low"], points["high"] - points["accuracy"]]
            axes.errorbar(points["pairs"], points["accuracy"], reach, fmt="o-", capsize=4, label=model)
        amounts = sorted(table["pairs"].unique())
        axes.set_xscale("log")
        axes.set_xticks(amounts, [f"{amount:,}" for amount in amounts])
        axes.minorticks_off()
        axes.set(xlabel="pairs learnt from", ylabel=f"accuracy on held-out {kind} pairs", title="reward_scaling")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    start(Params, run)
