"""Score `clean` where the truth is known: in the default world. The truth is read only after cleaning is done."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.clean.personal_data import TYPES
from tasks.running.files import read_lines

Key = tuple[str, int]  # file and row
Truth = dict[str, list[tuple[Key, dict[str, Any]]]]  # by kind: where it stands, and the label


class Outcome(NamedTuple):
    """What became of one document: `rule` is "" if it was kept, and only then the text is known."""

    rule: str
    language: str
    masked: Mapping[str, int]
    text: str


def score(labels: Path, output: Path) -> dict[str, float]:
    """Return precision and recall of each kind of planted dirt, and the accuracy of languages and repairs.

    `labels` holds one planted item per line (file, row, kind, and the truth about it); `output` is what `clean` wrote.
    """
    truth: Truth = defaultdict(list)
    for label in read_lines(labels):
        truth[label["kind"]].append(((label["file"], label["row"]), label))
    outcomes = _read_outcomes(output, {key for planted in truth.values() for key, _ in planted})
    return {
        **_score_duplicates(truth, outcomes),
        **_score_personal_data(truth, outcomes),
        **_score_languages(truth, outcomes),
        **_score_quality(truth, outcomes),
        "broken_unicode_recall": ratio(
            outcomes[key].rule != "" or outcomes[key].text.strip() == label["repaired"].strip()
            for key, label in truth["broken_unicode"]
        ),
    }


def _read_outcomes(output: Path, with_text: set[Key]) -> dict[Key, Outcome]:
    """Return what became of each document; the text only of kept ones that have a label."""
    import pandas as pd

    outcomes = {}
    for folder in ("documents", "rejected"):
        for path in sorted((output / folder).glob("part-*.parquet")):
            part = pd.read_parquet(path)
            for row in part.to_dict("records"):
                key = (row["file"], row["row"])
                masked = {kind: row.get(f"masked_{kind}", 0) for kind in TYPES}
                text = row["text"] if folder == "documents" and key in with_text else ""
                outcomes[key] = Outcome(row.get("rule", ""), row["language"], masked, text)
    return outcomes


def ratio(hits: Iterable[bool]) -> float:
    """Return the share of hits; 1 if there was nothing to hit."""
    counted = Counter(map(bool, hits))
    total = counted.total()
    return counted[True] / total if total else 1.0


def _score_duplicates(truth: Truth, outcomes: Mapping[Key, Outcome]) -> dict[str, float]:
    """Return recall (all but one of a group are rejected) and precision (what is rejected as a copy is planted)."""
    figures = {}
    planted = {key for kind in ("duplicate", "near_duplicate") for key, _ in truth[kind]}
    for kind, name in (("duplicate", "duplicates"), ("near_duplicate", "near_duplicates")):
        groups: dict[Any, list[bool]] = defaultdict(list)
        for key, label in truth[kind]:
            groups[label["group"]].append(outcomes[key].rule != "")
        extra = sum(len(group) - 1 for group in groups.values())
        found = sum(min(len(group) - 1, sum(group)) for group in groups.values())
        figures[f"{name}_recall"] = found / extra if extra else 1.0
        figures[f"{name}_precision"] = ratio(
            key in planted for key, outcome in outcomes.items() if outcome.rule == kind
        )
    return figures


def _score_personal_data(truth: Truth, outcomes: Mapping[Key, Outcome]) -> dict[str, float]:
    """Return recall (a planted value is in no kept text) and precision (what is masked in a document is planted)."""
    figures = {}
    values = [
        (key, value["type"], value["value"])
        for key, label in [*truth["personal_data"], *truth["personal_data_rich"]]
        for value in label["values"]
    ]
    for kind in TYPES:
        own = [(key, value) for key, value_kind, value in values if value_kind == kind]
        figures[f"{kind}_recall"] = ratio(
            outcomes[key].rule != "" or value not in outcomes[key].text for key, value in own
        )
        planted = Counter(key for key, _ in own)
        masked = {key: outcome.masked[kind] for key, outcome in outcomes.items() if outcome.masked[kind]}
        right = sum(min(number, planted[key]) for key, number in masked.items())
        figures[f"{kind}_precision"] = right / sum(masked.values()) if masked else 1.0
    rich = {key for key, _ in truth["personal_data_rich"]}
    figures["personal_data_rich_recall"] = ratio(outcomes[key].rule != "" for key in rich)
    figures["personal_data_rich_precision"] = ratio(
        key in rich for key, outcome in outcomes.items() if outcome.rule == "personal_data"
    )
    return figures


def _score_languages(truth: Truth, outcomes: Mapping[Key, Outcome]) -> dict[str, float]:
    """Return accuracy on labelled documents, and precision (what is rejected by language has a label)."""
    languages = {key: label["language"] for key, label in truth["language"]}
    return {
        "language_accuracy": ratio(outcomes[key].language == language for key, language in languages.items()),
        "language_precision": ratio(
            key in languages for key, outcome in outcomes.items() if outcome.rule == "language"
        ),
    }


def _score_quality(truth: Truth, outcomes: Mapping[Key, Outcome]) -> dict[str, float]:
    """Return recall of planted boilerplate lines and low-quality documents, and precision of rejecting for quality."""
    low = {key for key, _ in truth["low_quality"]}
    return {
        "boilerplate_recall": ratio(
            outcomes[key].rule != "" or line not in outcomes[key].text
            for key, label in truth["boilerplate"]
            for line in label["lines"]
        ),
        "low_quality_recall": ratio(outcomes[key].rule != "" for key in low),
        "low_quality_precision": ratio(
            key in low for key, outcome in outcomes.items() if outcome.rule.startswith(("empty", "c4_", "gopher_"))
        ),
    }
