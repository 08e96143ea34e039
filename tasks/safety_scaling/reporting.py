"""The figures, plots and picture of the study `safety_scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.judging.wins import mean_of
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage
from tasks.safety_scaling.study import Params, Training, Trial, group_of

if TYPE_CHECKING:
    import pandas as pd

NUM_BINS = 10
REWARDS = Plot(
    "curves", "Rewards against safety data", "share", "value", "share of the safety data", "mean probability", "figure"
)
SHARES = Plot(
    "curves", "Violations, false refusals", "share", "value", "share of the safety data", "share of answers", "figure"
)
UTILITIES = Plot("curves", "Judged utility", "share", "value", "share of the safety data", "utility", "figure")
LONG_TAIL = Plot(
    "curves", "Safety scores of adversarial prompts", "probability", "answers", "probability of being safe",
    "share of the answers", "share",
)  # fmt: skip
PLOTTED = {
    "rewards": (REWARDS, ("safety/reward", "helpfulness/reward")),
    "refusals": (SHARES, ("safety/violations", "helpfulness/false_refusals", "borderline/false_refusals")),
    "utilities": (UTILITIES, ("safety/utility", "helpfulness/utility")),
}


def report(stage: Stage[Params], trial: Trial, found: Sequence[tuple[Training, Mapping[str, Any]]]) -> dict[str, float]:
    """Write trainings, scores, curves and the picture; return the figures of each share."""
    import pandas

    rows = []
    figures: dict[str, float] = {
        "trainings": len(found), "prompts": len(trial.prompts), "prompts_too_long": trial.num_too_long,
    }  # fmt: skip
    for share in sorted(stage.params.shares):
        own = [each["figures"] for training, each in found if training.share == share]
        for name in own[0]:
            estimate = mean_of([each[name] for each in own])
            place = f"share_{share:g}/{name}"
            figures |= {place: estimate.value, f"{place}/low": estimate.low, f"{place}/high": estimate.high}  # type: ignore[dict-item]
            rows.append({"share": share, "figure": name, **estimate._asdict()})
    if stage.rank == 0:
        table = pandas.DataFrame(rows).rename(columns={"prompts": "seeds"})
        for name, (plot, wanted) in PLOTTED.items():
            part = table[table["figure"].isin(wanted)]
            if len(part):
                stage.plot(name, part, plot)
        tail = tail_of(found)
        stage.plot("tail", tail, LONG_TAIL)
        write_runs(stage, trial, found)
        table.to_csv(stage.tables / "shares.csv", index=False)
        plot_scaling(table, tail, stage.artifacts / "scaling.png")
    return figures


def write_runs(stage: Stage[Params], trial: Trial, found: Sequence[tuple[Training, Mapping[str, Any]]]) -> None:
    """Write a line for each training, and for each of its answers to an adversarial prompt."""
    import pandas

    asked = [prompt for prompt in trial.prompts if group_of(prompt) == "safety"]
    runs = [{"share": each.share, "safe": each.num_safe, "seed": each.seed, **own["figures"]} for each, own in found]
    scores = [
        {
            "share": each.share, "seed": each.seed, "id": prompt.id, "risk": prompt.risk, "attack": prompt.attack,
            "safe_probability": value,
        }
        for each, own in found
        for prompt, value in zip(asked, own["safe"], strict=True)
    ]  # fmt: skip
    pandas.DataFrame(runs).to_csv(stage.output / "runs.csv", index=False)
    pandas.DataFrame(scores).to_csv(stage.output / "scores.csv", index=False)


def tail_of(found: Sequence[tuple[Training, Mapping[str, Any]]]) -> pd.DataFrame:
    """Return the histogram of the answers' probabilities of being safe, for each share: means over the seeds."""
    import pandas

    rows = []
    for share in sorted({training.share for training, _ in found}):
        values = [value for training, own in found if training.share == share for value in own["safe"]]
        counts, ends = np.histogram(values, bins=NUM_BINS, range=(0, 1))
        middles = (ends[:-1] + ends[1:]) / 2
        rows += [
            {"share": f"{share:g}", "probability": round(float(middle), 6), "answers": float(count) / len(values)}
            for middle, count in zip(middles, counts, strict=True)
        ]
    return pandas.DataFrame(rows)


def plot_scaling(table: pd.DataFrame, tail: pd.DataFrame, path: Path) -> None:
    """Plot rewards, violations and refusals against the share, and the long tail of the safety scores."""
    curves = [own for own in (PLOTTED["rewards"], PLOTTED["refusals"]) if table["figure"].isin(own[1]).any()]
    shares = sorted(table["share"].unique())
    with picture(path, 5.5 * (len(curves) + 1), 4, ncols=len(curves) + 1) as panels:
        for axes, (plot, wanted) in zip(panels, curves, strict=False):
            for figure, points in table[table["figure"].isin(wanted)].groupby("figure", sort=False):
                reach = [points["value"] - points["low"], points["high"] - points["value"]]
                axes.errorbar(range(len(shares)), points["value"], reach, fmt="o-", capsize=4, label=figure)
            axes.set_xticks(range(len(shares)), [f"{share:.4g}" for share in shares])
            axes.set(xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title)
            axes.legend()
        for share, points in tail.groupby("share", sort=False):
            panels[-1].plot(points["probability"], points["answers"], "o-", label=f"{share} of the safety data")
        panels[-1].set(xlabel=LONG_TAIL.x_label, ylabel=LONG_TAIL.y_label, title=LONG_TAIL.title)
        panels[-1].legend()
