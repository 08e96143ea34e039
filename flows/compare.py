"""What differs between two versions: `python -m flows.compare v3 v5`.

Prints the parameters and the data of all stages that led to each, by dvc.lock, and the figures of their evaluations. A
difference of figures is paired by prompt, with a 95% bootstrap interval; a star marks one whose interval excludes zero.
Any name in `evaluate.checkpoints` of params.yaml will do. `--all` prints what is equal, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.reading.lineage import Lock, data_of, lineage, read_lock
from tasks.reading.prompts import kind_of
from tasks.reading.rounds import NAME
from tasks.running.files import read_json, read_lines
from tasks.running.fingerprint import params_of_entry
from tasks.running.params import read_params
from tasks.running.places import DATA, entry_of, section_of

if TYPE_CHECKING:
    from tasks.judging.wins import Estimate

NONE = "-"  # where one of the two has no such value
Row = tuple[str, ...]


def checkpoint_of(name: str, checkpoints: Mapping[str, str]) -> Path:
    """Return an evaluation's checkpoint. Raises ValueError, with the names that exist, for another one."""
    if name not in checkpoints:
        raise ValueError(f"{name} is not evaluated; `evaluate.checkpoints` of params.yaml has {', '.join(checkpoints)}")
    return Path(checkpoints[name])


# --- parameters and data ---


def newest_stages(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return the name and the entry of each section's stage: the last round's, where there are several."""

    def age(name: str) -> tuple[int, str]:
        found = NAME.fullmatch(entry_of(name))
        return (int(found[1]) if found else -1, name)

    return {section_of(name): (name, stages[name]) for name in sorted(stages, key=age)}


def without_entry(text: str, stage: str) -> str:
    """Return a path or a parameter's name with `<entry>` for the stage's own: two rounds' are then called the same."""
    entry = entry_of(stage)
    for separator in "/.":
        parts = text.split(separator)
        text = separator.join("<entry>" if entry and part == entry else part for part in parts)
    return text


def compare_stages(names: Sequence[str], stages: Sequence[Lock], everything: bool) -> tuple[list[Row], list[Row]]:
    """Return rows of parameters and rows of data, each with its section: those that differ, or all of them.

    Of the rounds behind a version, the newest one of each section is compared. A digest stands for data.
    """
    newest = [newest_stages(own) for own in stages]
    params: list[Row] = []
    data: list[Row] = []
    for section in dict.fromkeys(section for own in newest for section in own):
        values: list[dict[str, str]] = []
        digests: list[dict[str, str]] = []
        for own in newest:
            stage, entry = own.get(section, ("", {}))
            values.append({without_entry(key, stage): str(value) for key, value in params_of_entry(entry).items()})
            digests.append({without_entry(each["path"], stage): digest_of(each) for each in data_of(entry)})
        params += [(section, *row) for row in side_by_side(values, everything)]
        data += [(section, *row) for row in side_by_side(digests, everything)]
    return params, data


def digest_of(dependency: Mapping[str, Any]) -> str:
    """Return the digest of a dependency in dvc.lock, short, with its size."""
    digest = str(dependency.get("md5", NONE))
    return f"{digest[:8]} ({dependency['size']:,} bytes)" if "size" in dependency else digest[:8]


def side_by_side(values: Sequence[Mapping[str, str]], everything: bool) -> list[Row]:
    """Return a row for each name with both values: those that differ, or all of them."""
    rows = [
        (name, *(own.get(name, NONE) for own in values)) for name in dict.fromkeys(k for own in values for k in own)
    ]
    return [row for row in rows if everything or row[1] != row[2]]


# --- figures ---


def values_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each figure, the value of every prompt that it counts; shares count 0 or 1."""
    found: dict[str, dict[str, float]] = {}

    def add(figure: str, line: Mapping[str, Any], value: float | None) -> None:
        if value is not None:
            found.setdefault(figure, {})[line["id"]] = float(value)

    for line in lines:
        kind, judgement = kind_of(line["category"], line["risk"]), line["judgement"]
        place = kind if line.get("gathered") is None else f"gathered/{line['gathered']}/{kind}"
        add("answer_tokens", line, line["num_tokens"])
        add(f"{place}/utility", line, line["utility"])
        if judgement is None:
            continue
        add("well_formed", line, judgement["well_formed"])
        if kind == "safety":
            add(f"{place}/violations", line, not judgement["safe"])
            continue
        add(f"{place}/false_refusals", line, judgement["refuses"])
        add(f"{place}/right", line, judgement["right"])
        add(f"{place}/followed", line, judgement["follows"])
        if line["category"] == "borderline":
            add("borderline/false_refusals", line, judgement["refuses"])
    return found


def compare_figures(names: Sequence[str], everything: bool) -> list[Row]:
    """Return a row for each figure of the evaluations: both values with intervals, and their difference by prompt.

    Figures that answers alone don't give, such as perplexity, have no interval of the difference. Raises ValueError
    when a version was never evaluated.
    """
    from tasks.judging.wins import gain_of, mean_of, share_of

    own: list[dict[str, dict[str, float]]] = []
    for name in names:
        path = DATA / "evaluate" / name / "answers.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} is missing: {name} was never evaluated; run stage `evaluate@{name}`")
        own.append(values_of(read_lines(path)))
    rows: list[Row] = []
    for figure in sorted(own[0].keys() & own[1].keys()):
        is_share = not figure.endswith(("utility", "tokens"))
        this, that = (values[figure] for values in own)
        both = [prompt for prompt in this if prompt in that]
        if not both or (not everything and this == that):
            continue
        each = [
            share_of([bool(value) for value in values.values()]) if is_share else mean_of(list(values.values()))
            for values in (this, that)
        ]
        gain = gain_of([that[prompt] - this[prompt] for prompt in both])
        excludes = gain.low is not None and gain.high is not None and (gain.low > 0 or gain.high < 0)
        rows.append(
            (figure, *map(in_line, each), f"{in_line(gain, sign='+')}{' *' if excludes else ''}", str(len(both)))
        )
    written = [read_json(DATA / "evaluate" / name / "metrics.json") for name in names]
    done = {row[0] for row in rows} | (own[0].keys() & own[1].keys())
    for figure in sorted(written[0].keys() & written[1].keys() - done):
        if figure.rpartition("/")[2] in ("low", "high"):
            continue
        first, second = (metrics[figure] for metrics in written)
        if everything or first != second:
            rows.append((figure, *(written_figure(each, figure) for each in written), f"{second - first:+.3f}", NONE))
    return rows


def written_figure(metrics: Mapping[str, float], figure: str) -> str:
    """Return a figure of metrics.json, with its interval where the evaluation has written one."""
    ends = [metrics.get(f"{figure}/{end}") for end in ("low", "high")]
    interval = "" if None in ends else f" ({ends[0]:.3f} to {ends[1]:.3f})"
    return f"{metrics[figure]:.3f}{interval}"


def in_line(found: Estimate, sign: str = "") -> str:
    """Return an estimate with its interval."""
    value = f"{found.value:{sign}.3f}"
    return value if found.low is None else f"{value} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


# --- output ---


def table(title: str, head: Row, rows: Sequence[Row]) -> str:
    """Return a table as text, its columns as wide as their longest cell."""
    if not rows:
        return f"{title}: no difference\n"
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines), ""])


def compare(names: Sequence[str], everything: bool) -> str:
    """Return what differs between two versions, as three tables.

    Raises ValueError for a name that is not evaluated, a version without answers, and when nothing has run.
    """
    checkpoints = read_params()["evaluate"]["checkpoints"]
    outputs = [checkpoint_of(name, checkpoints) for name in names]
    lock = read_lock()
    stages = [lineage(lock, output) for output in outputs]
    params, data = compare_stages(names, stages, everything)
    only = [
        f"Stages behind {name} alone: {', '.join(sorted(own.keys() - other.keys())) or 'none'}"
        for name, own, other in zip(names, stages, reversed(stages), strict=True)
    ]
    figures = compare_figures(names, everything)
    head = ("figure", *names, f"{names[1]} - {names[0]} (* excludes zero)", "prompts")
    return "\n".join(
        [
            *only,
            "",
            table("Parameters", ("section", "parameter", *names), params),
            table("Data that the stages read", ("section", "path", *names), data),
            table("Figures, with 95% intervals", head, figures),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.compare", description="Print how two versions differ.")
    parser.add_argument("names", nargs=2, metavar="VERSION", help="a name in evaluate.checkpoints of params.yaml")
    parser.add_argument("--all", action="store_true", help="print what is equal, too")
    chosen = parser.parse_args(arguments)
    try:
        sys.stdout.write(compare(chosen.names, chosen.all))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
