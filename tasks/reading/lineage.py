"""Which stages led to an output, by dvc.lock: their parameters, and the digests and sizes of the data they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.running.places import DATA, NOTHING

Lock = Mapping[str, Mapping[str, Any]]  # dvc.lock's entries by the stages' names


def read_lock() -> dict[str, dict[str, Any]]:
    """Return dvc.lock's entries. Raises ValueError when there is none."""
    from ruamel.yaml import YAML

    path = Path("dvc.lock")
    if not path.is_file():
        raise ValueError("dvc.lock is missing: nothing has run here; `make run` runs the pipeline")
    stages: dict[str, dict[str, Any]] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"]
    return stages


def lineage(lock: Lock, output: Path) -> dict[str, Mapping[str, Any]]:
    """Return the entries of all stages that an output was made by, directly or not, by name in order."""
    made = {Path(out["path"]): name for name, entry in lock.items() for out in entry["outs"]}
    found: set[str] = set()
    waiting = [output]
    while waiting:
        path = waiting.pop()
        for place, name in made.items():
            if name not in found and (path.is_relative_to(place) or place.is_relative_to(path)):
                found.add(name)
                waiting += [Path(each["path"]) for each in data_of(lock[name])]
    return {name: lock[name] for name in sorted(found)}


def data_of(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the dependencies of a stage that are data, with `path`, `md5` and `size`; code is left out."""
    return [
        each
        for each in entry.get("deps", [])
        if Path(each["path"]).is_relative_to(DATA) and Path(each["path"]) != NOTHING
    ]
