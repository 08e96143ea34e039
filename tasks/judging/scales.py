"""What the scores of a round's two reward models mean: log-odds, and a threshold of safety (Llama 2, section 3.2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tasks.judging.calibration import Line, Threshold, choose_threshold, fit_helpfulness, fit_safety
from tasks.judging.ranking import Scales
from tasks.reading.prompts import KINDS
from tasks.running.files import read_lines
from tasks.running.places import DATA


class Fitted(NamedTuple):
    """What both models' raw scores mean, and labels of safety: score, is it safe, is its pair about safety."""

    helpfulness: Line
    safety: Line
    labels: list[tuple[float, bool, bool]]


def calibrate(round_name: str, precision: float) -> tuple[Scales, Threshold]:
    """Return what the round's reward models' scores mean, by the scores and labels of the pairs held out from them.

    The threshold decides for prompts that are not tagged as adversarial, where most answers are safe: it is chosen on
    labels of answers to such prompts, or on all labels where there are none of these.
    Raises ValueError as `fit_lines` does.
    """
    fitted = fit_lines(round_name)
    decided = [label for label in fitted.labels if not label[2]] or fitted.labels
    probabilities = [fitted.safety.probability(score) for score, _, _ in decided]
    threshold = choose_threshold(probabilities, [safe for _, safe, _ in decided], precision)
    return Scales(fitted.helpfulness, fitted.safety, threshold.threshold), threshold


def fit_lines(round_name: str) -> Fitted:
    """Return what the round's reward models' scores mean, without a threshold.

    Raises ValueError as `tasks.judging.calibration` does, and for scores that are missing.
    """
    rows = {kind: read_scores(DATA / f"reward_{kind}" / round_name / "scores.jsonl") for kind in KINDS}
    pairs = [row for row in rows["helpfulness"] if row["kind"] == "helpfulness"]
    helpfulness = fit_helpfulness(*([row[f"{side}_score"] for row in pairs] for side in ("chosen", "rejected")))
    labels = [
        (float(row[f"{side}_score"]), bool(row[f"{side}_safe"]), row["kind"] == "safety")
        for row in rows["safety"]
        for side in ("chosen", "rejected")
        if row[f"{side}_safe"] is not None
    ]
    safety = fit_safety([score for score, _, _ in labels], [safe for _, safe, _ in labels])
    return Fitted(helpfulness, safety, labels)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return a reward model's scores of held-out pairs. Raises ValueError when they are missing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run stage `{path.parent.parent.name}@{path.parent.name}`")
    return read_lines(path)
