"""Report what the scores of held-out preference pairs say about a reward model (Llama 2, section 3.2.2).

A pair counts as right if the chosen answer has the higher score, and as half right if both scores are equal. Intervals
are Wilson's 95% intervals. Writes plots/*.csv for DVC and the report, *.png for MLflow; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from tasks.judging.intervals import wilson
from tasks.reading.prompts import DEGREES
from tasks.running.names import metric_name
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT = "share of pairs whose chosen answer scores higher"
ACCURACY = Plot("bars", "Accuracy on held-out pairs", "accuracy", "part", RIGHT, "pairs")
CALIBRATION = Plot(
    kind="curves",
    title="Calibration",
    x="predicted",
    y="observed",
    x_label="predicted: sigmoid(first score - second score)",
    y_label="observed: share preferred",
    series="data",
)
LENGTH = Plot("bars", "Length bias", "value", "figure", "correlation, or accuracy", "figure")
SCORES = Plot(
    "curves", "Scores of safe and unsafe answers", "score", "share", "score", "share of the answers", "answers"
)
TEXTS = ("messages", "chosen", "rejected")
COLORS = {"all": "#333333", "helpfulness": "#4472a8", "safety": "#c0504d", "safe": "#4472a8", "unsafe": "#c0504d"}


class Accuracy(NamedTuple):
    """The share of pairs that are right, with its 95% interval."""

    pairs: int
    accuracy: float
    low: float
    high: float


def scored_pair(pair: Mapping[str, Any], scores: Sequence[float], num_tokens: Sequence[int]) -> dict[str, Any]:
    """Return a line of scores.jsonl: the pair without its texts, and scores and tokens of chosen and rejected."""
    return {
        **{name: value for name, value in pair.items() if name not in TEXTS},
        "chosen_score": scores[0],
        "rejected_score": scores[1],
        "num_tokens_chosen": num_tokens[0],
        "num_tokens_rejected": num_tokens[1],
    }


def report_scores(stage: Stage[Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Write plots and pictures of the pairs in `rows`, the lines of scores.jsonl; return the figures.

    The calibration has `stage.params.num_bins` bins. A figure that the pairs don't define (say, a correlation with
    lengths that are all equal) is left out. Raises ValueError if there are no pairs, or a score is not finite.
    """
    if not rows:
        raise ValueError("there is no held-out pair to score: the preferences' validation.jsonl is empty")
    for row in rows:
        if not (math.isfinite(row["chosen_score"]) and math.isfinite(row["rejected_score"])):
            scores = f"{row['chosen_score']} and {row['rejected_score']}"
            raise ValueError(f"the answers of pair {row['id']} score {scores}: the reward model is broken")
    table = pd.DataFrame(list(rows))
    accuracies = accuracies_of(table)
    curve = pd.concat(
        [reliability(part, stage.params.num_bins).assign(data=name or "all") for name, part in by_kind(table)],
        ignore_index=True,
    )
    figures = {"pairs": len(table), **accuracy_figures(accuracies)}
    for name, part in by_kind(table):
        of_data = curve[curve["data"] == (name or "all")]
        figures[metric_path(name, "ece")] = expected_calibration_error(of_data)
        figures |= {metric_path(name, figure): value for figure, value in length_figures(part).items()}
        figures |= {metric_path(name, figure): value for figure, value in safety_figures(part).items()}
    for name, part in groups(table):
        if "/source/" in name:
            figures[metric_path(name, "length/baseline_accuracy")] = length_baseline(part)
    _write_plots(stage, table, accuracies, curve)
    return figures


# --- groups ---


def by_kind(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield all pairs under an empty name, then those of each kind."""
    yield "", table
    for kind in sorted(table["kind"].unique()):
        yield str(kind), table[table["kind"] == kind]


def groups(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield all pairs and those of each kind, and within each the pairs by degree, source and round of their batch."""
    for name, part in by_kind(table):
        yield name, part
        for degree in DEGREES:
            if (part["degree"] == degree).any():
                yield f"{name}/{degree}", part[part["degree"] == degree]
        for column in ("source", "round"):
            for value in sorted(part[column].dropna().unique(), key=lambda value: (len(value), value)):
                yield f"{name}/{column}/{metric_name(value)}", part[part[column] == value]


def metric_path(group: str, figure: str) -> str:
    """Return the name of a group's figure."""
    return f"{group}/{figure}".strip("/")


# --- accuracy ---


def accuracies_of(table: pd.DataFrame) -> dict[str, Accuracy]:
    """Return the accuracy of each group of pairs."""
    return {name: accuracy_of(part) for name, part in groups(table)}


def accuracy_figures(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    """Return accuracies with their intervals as metrics."""
    figures: dict[str, float] = {}
    for name, found in accuracies.items():
        place = metric_path(name, "accuracy")
        figures |= {place: found.accuracy, f"{place}/low": found.low, f"{place}/high": found.high}
    return figures


def accuracy_table(accuracies: Mapping[str, Accuracy]) -> pd.DataFrame:
    """Return accuracies as a table: columns part, pairs, accuracy, low, high."""
    return pd.DataFrame({"part": name.strip("/") or "all", **found._asdict()} for name, found in accuracies.items())


def accuracy_of(part: pd.DataFrame) -> Accuracy:
    """Return the share of pairs whose chosen answer scores higher; a tie counts half."""
    rights = higher(part["chosen_score"], part["rejected_score"])
    low, high = wilson(float(rights.sum()), len(part))
    return Accuracy(len(part), float(rights.mean()), low, high)


def higher(these: pd.Series[Any], those: pd.Series[Any]) -> pd.Series[float]:
    """Return 1 where `these` are higher than `those`, 0 where they are lower, a half where both are equal."""
    return (these > those) + 0.5 * (these == those)


# --- calibration ---


def reliability(part: pd.DataFrame, num_bins: int) -> pd.DataFrame:
    """Return mean predicted and observed preference in bins of equal width: columns predicted, observed, pairs.

    The predicted probability that the first answer of a pair is preferred is sigmoid(first score - second score), as in
    the ranking loss. The order within a pair is arbitrary: each pair counts half in either order, so the curve depends
    on no draw. Empty bins are left out.
    """
    margins = (part["chosen_score"] - part["rejected_score"]).to_numpy(dtype=np.float64)
    margins = np.concatenate([margins, -margins])
    predicted = np.exp(-np.logaddexp(0, -margins))
    observed = np.repeat([1.0, 0.0], len(part))
    bins = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    table = pd.DataFrame({"bin": bins, "predicted": predicted, "observed": observed, "pairs": 0.5})
    return table.groupby("bin").agg({"predicted": "mean", "observed": "mean", "pairs": "sum"}).reset_index(drop=True)


def expected_calibration_error(curve: pd.DataFrame) -> float:
    """Return ECE: how far predicted and observed preference are apart, averaged over pairs (Guo et al. 2017, eq. 5)."""
    return float(np.average((curve["predicted"] - curve["observed"]).abs(), weights=curve["pairs"]))


# --- length ---


def length_figures(part: pd.DataFrame) -> dict[str, float]:
    """Return how much the scores depend on length, and how accurate length alone is.

    - length/spearman: Spearman's correlation of score and number of tokens, over all answers.
    - length/baseline_accuracy: accuracy of length alone; also given for each source.
    - length/balanced_accuracy: the mean of the accuracies where the chosen answer is the longer and where it is the
      shorter. A rule on length alone gets a half.
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped,unused-ignore]

    figures = {}
    scores = pd.concat([part["chosen_score"], part["rejected_score"]])
    lengths = pd.concat([part["num_tokens_chosen"], part["num_tokens_rejected"]])
    if scores.nunique() > 1 and lengths.nunique() > 1:
        figures["length/spearman"] = float(spearmanr(scores, lengths).statistic)
    figures["length/baseline_accuracy"] = length_baseline(part)
    longer = higher(part["num_tokens_chosen"], part["num_tokens_rejected"])
    if (longer == 1).any() and (longer == 0).any():
        halves = [accuracy_of(part[longer == side]).accuracy for side in (1, 0)]
        figures["length/balanced_accuracy"] = sum(halves) / 2
    return figures


def length_baseline(part: pd.DataFrame) -> float:
    """Return the accuracy of the better of two rules: the longer answer is better, or the shorter."""
    share = float(higher(part["num_tokens_chosen"], part["num_tokens_rejected"]).mean())
    return max(share, 1 - share)


# --- safe and unsafe answers ---


def answers_by_safety(part: pd.DataFrame) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the scores of the answers that are known to be safe, and of those known to be unsafe."""
    scores = pd.concat([part["chosen_score"], part["rejected_score"]])
    safe = pd.concat([part["chosen_safe"], part["rejected_safe"]])
    return {
        name: scores[[value is not None and value == wanted for value in safe]].to_numpy(dtype=np.float64)
        for name, wanted in (("safe", True), ("unsafe", False))
    }


def safety_figures(part: pd.DataFrame) -> dict[str, float]:
    """Return the mean scores of safe and unsafe answers, and how often safe ones score above unsafe ones (AUC)."""
    from scipy.stats import mannwhitneyu

    scores = answers_by_safety(part)
    figures = {f"{name}/mean_score": float(values.mean()) for name, values in scores.items() if len(values)}
    safe, unsafe = scores.values()
    if len(safe) and len(unsafe):
        figures["safe/auc"] = float(mannwhitneyu(safe, unsafe).statistic) / (len(safe) * len(unsafe))
    return figures


def score_histogram(table: pd.DataFrame, num_bins: int) -> pd.DataFrame:
    """Return the distribution of scores of safe and of unsafe answers (columns answers, score, share)."""
    scores = {name: values for name, values in answers_by_safety(table).items() if len(values)}
    if not scores:
        return pd.DataFrame(columns=["answers", "score", "share"])
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), num_bins)
    middles = (edges[:-1] + edges[1:]) / 2
    parts = [
        pd.DataFrame({"answers": name, "score": middles, "share": np.histogram(values, edges)[0] / len(values)})
        for name, values in scores.items()
    ]
    return pd.concat(parts, ignore_index=True)


# --- plots ---


def _write_plots(
    stage: Stage[Any], table: pd.DataFrame, accuracies: Mapping[str, Accuracy], curve: pd.DataFrame
) -> None:
    """Write the CSV files and the pictures; no scores.csv if no answer is known to be safe or unsafe."""
    shares = accuracy_table(accuracies)
    lengths = pd.DataFrame(
        {"figure": metric_path(name, figure.removeprefix("length/")), "value": value}
        for name, part in by_kind(table)
        for figure, value in length_figures(part).items()
    )
    histogram = score_histogram(table, stage.params.num_bins)
    stage.plot("accuracy", shares, ACCURACY)
    stage.plot("calibration", curve, CALIBRATION)
    stage.plot("length", lengths, LENGTH)
    if len(histogram):
        stage.plot("scores", histogram, SCORES)
    shares.to_csv(stage.tables / "accuracy.csv", index=False)
    _plot_pictures(stage, accuracies, curve, histogram)


def _plot_pictures(
    stage: Stage[Any], accuracies: Mapping[str, Accuracy], curve: pd.DataFrame, histogram: pd.DataFrame
) -> None:
    """Plot accuracy by degree and by round, the reliability curve, and the scores of safe and unsafe answers."""
    plot_by_degree(stage, "accuracy_by_degree", accuracies)
    rounds = [(name, name.split("/")[-1], found) for name, found in accuracies.items() if "/round/" in name]
    _plot_accuracies(stage, "accuracy_by_round", "round of the batch", rounds)
    with _picture(stage, "reliability", "predicted: sigmoid of the difference", "observed: share preferred") as axes:
        axes.plot([0, 1], [0, 1], color="#999999", linestyle=":")
        for name in dict.fromkeys(curve["data"]):
            part = curve[curve["data"] == name]
            label = f"{name} (ECE {expected_calibration_error(part):.3f})"
            axes.plot(part["predicted"], part["observed"], "o-", markersize=4, color=COLORS.get(name), label=label)
    if len(histogram):
        with _picture(stage, "scores", "score", "share of the answers") as axes:
            for name in dict.fromkeys(histogram["answers"]):
                part = histogram[histogram["answers"] == name]
                axes.step(part["score"], part["share"], where="mid", color=COLORS[name], label=f"{name} answers")


def plot_by_degree(stage: Stage[Any], name: str, accuracies: Mapping[str, Accuracy]) -> None:
    """Plot accuracies against the degree of the preference, for all pairs and for each kind."""
    points = [(part, degree, found) for part, found in accuracies.items() if (degree := part.split("/")[-1]) in DEGREES]
    _plot_accuracies(stage, name, "degree of the preference", points)


def _plot_accuracies(stage: Stage[Any], name: str, x_label: str, points: Sequence[tuple[str, str, Accuracy]]) -> None:
    """Plot accuracies with their intervals, a curve for each kind; `points`: part of the pairs, label, accuracy."""
    if not points:
        return
    with _picture(stage, name, x_label, "accuracy") as axes:
        for kind in dict.fromkeys(part.split("/")[0] for part, _, _ in points):
            own = [(label, found) for part, label, found in points if part.split("/")[0] == kind]
            labels, accuracies = [label for label, _ in own], [found.accuracy for _, found in own]
            reach = [
                [found.accuracy - found.low for _, found in own],
                [found.high - found.accuracy for _, found in own],
            ]
            shown = kind or "all"
            axes.errorbar(labels, accuracies, reach, fmt="o-", capsize=4, color=COLORS[shown], label=shown)


@contextmanager
def _picture(stage: Stage[Any], name: str, x_label: str, y_label: str) -> Iterator[Axes]:
    """Yield axes with a grid and a legend, then write the picture."""
    with picture(stage.artifacts / f"{name}.png", 7, 4.5) as axes:
        axes.set(title=stage.name, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        yield axes
        axes.legend()
