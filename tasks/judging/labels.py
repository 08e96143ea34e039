"""Read people's labels of a batch: JSON lines, CSV, or a Label Studio export.

They are in <directory>/<round>/<kind>.jsonl, .csv or .json (the export), one label per row:

    {"batch": "v1-safety-0a1b2c3d4e5f", "id": "...", "annotator": "...", "choice": "left", "degree": "better",
     "left_safe": true, "right_safe": false}

`left_safe` and `right_safe` belong to safety batches. What counts:

- A pair with one label has that label. An annotator's later label of a pair replaces the earlier one; a second label
  without an annotator stops the stage.
- Labels of several annotators are combined: the majority's choice; the median degree within that majority, the weaker
  of two middle ones; an answer is safe if most say so. If the choices tie, the pair is set aside.
- A label with an invalid choice, degree or safety doesn't count. A pair without a label that counts is set aside, as
  unlabelled or with what was wrong.
- Labels of another batch, or of a pair that isn't in the batch, stop the stage, as does a row that can't be read.
- Until each batch that has pairs has a file, the stage waits.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from tasks.judging.label_studio import FIELDS, SIDES, read_export
from tasks.reading.prompts import DEGREES, Degree, Kind, Label
from tasks.running.stage import Waiting

SUFFIXES = (".jsonl", ".csv", ".json")
UNKNOWN = "unknown"  # the annotator of a label that names none


class Labels(NamedTuple):
    """The labels of one batch by pair, and what was wrong with those that don't count."""

    by_pair: dict[str, list[Label]]
    faults: dict[str, list[str]]
    num_replaced: int


class Decision(NamedTuple):
    """The labels of a pair, combined."""

    choice: Literal[0, 1]
    degree: Degree
    safe: tuple[bool, bool] | None
    annotator: str


def find_labels(directory: Path, round_name: str, batches: Mapping[Kind, str]) -> dict[Kind, Path]:
    """Return the label file of each batch; `batches` holds their names by kind.

    Raises Waiting when one is missing, ValueError when there are several.
    """
    found: dict[Kind, Path] = {}
    missing = []
    for kind, batch in batches.items():
        place = directory / round_name / kind
        paths = [place.with_suffix(suffix) for suffix in SUFFIXES if place.with_suffix(suffix).is_file()]
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(map(str, paths))} both exist: keep one of them")
        if paths:
            found[kind] = paths[0]
        else:
            missing.append((batch, place.with_suffix(".jsonl")))
    if missing:
        names, places = (" and ".join(map(str, each)) for each in zip(*missing, strict=True))
        raise Waiting(f"waiting for the labels of {names}, put them at {places} (or .csv, or Label Studio's .json)")
    return found


def read_labels(path: Path, kind: Kind, batch: str, pair_ids: Collection[str]) -> Labels:
    """Return the labels of a batch. Raises ValueError as the module's rules say."""
    by_pair: dict[str, dict[str, Label]] = defaultdict(dict)
    faults: dict[str, list[str]] = defaultdict(list)
    num_replaced = 0
    for where, row in _rows(path):
        if row.get("batch") != batch:
            raise ValueError(
                f"{path}, {where} is a label of batch {row.get('batch')}, but {batch} is expected: bring the labels of "
                "the tasks that stage `responses` wrote last"
            )
        pair_id = str(row.get("id"))
        if pair_id not in pair_ids:
            raise ValueError(f"{path}, {where} is a label of pair {pair_id!r}, which is not in batch {batch}")
        fault = _fault_of(row, kind)
        if fault is not None:
            faults[pair_id].append(f"{where}: {fault}")
            continue
        annotator = str(row.get("annotator") or UNKNOWN)
        if annotator == UNKNOWN and UNKNOWN in by_pair[pair_id]:
            raise ValueError(
                f"{path}, {where} is a second label of pair {pair_id} without an `annotator`: name the annotators, or "
                "several people's labels can't be told from one person's corrections"
            )
        safe = (row["left_safe"], row["right_safe"]) if kind == "safety" else None
        num_replaced += annotator in by_pair[pair_id]
        choice = cast(Literal[0, 1], SIDES.index(row["choice"]))
        by_pair[pair_id][annotator] = Label(choice, row["degree"], safe, annotator)
    labels = {pair_id: list(own.values()) for pair_id, own in by_pair.items()}
    return Labels(labels, dict(faults), num_replaced)


def _fault_of(row: Mapping[str, Any], kind: Kind) -> str | None:
    """Return what keeps a label from counting, or None."""
    if row.get("choice") not in SIDES:
        return f"choice {row.get('choice')!r} is neither left nor right"
    if row.get("degree") not in DEGREES:
        return f"unknown degree {row.get('degree')!r}: it is none of {', '.join(DEGREES)}"
    if kind == "safety":
        for side in SIDES:
            if not isinstance(row.get(f"{side}_safe"), bool):
                return f"{side}_safe {row.get(f'{side}_safe')!r} is neither true nor false"
    return None


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where each row is, and the row."""
    if path.suffix == ".json":
        yield from read_export(path)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON ({error}): correct it") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} holds no JSON object: correct it")
            yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a CSV file with a header; `true` and `false` may be in any case."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = {"batch", "id", "choice", "degree"} - set(columns)
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; it has: {', '.join(columns)}")
        for row in reader:
            values: dict[str, Any] = {
                name: (value or "").strip() for name, value in row.items() if isinstance(value, str)
            }
            for name in FIELDS[2:]:
                text = values.get(name, "")
                values[name] = {"true": True, "false": False}.get(text.lower(), text)
            yield f"line {reader.line_num}", values


def decide(labels: Sequence[Label]) -> Decision | None:
    """Return the combined labels of one pair; None: a tie."""
    votes = sum(1 if label.choice else -1 for label in labels)
    if votes == 0:
        return None
    choice: Literal[0, 1] = 1 if votes > 0 else 0
    degrees = sorted((label.degree for label in labels if label.choice == choice), key=DEGREES.index)
    seen = [label.safe for label in labels if label.safe is not None]
    safe = None
    if seen:
        left, right = (sum(each[side] for each in seen) * 2 > len(seen) for side in (0, 1))
        safe = (left, right)
    return Decision(choice, degrees[len(degrees) // 2], safe, " ".join(sorted(label.annotator for label in labels)))
