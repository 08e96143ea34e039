"""Everything that determines a stage's result, as one digest: what DVC compares, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.running.params import PARAMS_FILE, flatten
from tasks.running.places import NOTHING


class Identity(NamedTuple):
    """What distinguishes one run of a stage from another."""

    digest: str  # of all that determines the result: command, digests of the dependencies, parameters
    params: dict[str, Any]  # by their dotted names
    datasets: list[dict[str, str]]  # `path` and `digest` of each dependency that is data


def fingerprint(stage_name: str) -> Identity:
    """Return the identity of a stage, given the current dvc.yaml, params.yaml and dependencies.

    Every dependency is hashed, unless DVC still knows its digest. Code is part of the digest, but in no list.
    Raises ValueError when dvc.yaml has no such stage.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile

    try:
        stages = [stage for stage in Repo().index.stages if stage.addressing.rpartition(":")[2] == stage_name]
        for stage in stages:
            stage.save_deps()
    except DvcException as error:
        raise ValueError(f"dvc.yaml's stage `{stage_name}` can't be read: {error}") from None
    if len(stages) != 1:
        raise ValueError(f"dvc.yaml's stage `{stage_name}` can't be read: {len(stages)} have that name, not one")
    (stage,) = stages
    entry = to_single_stage_lockfile(stage)
    data = [
        {"path": dep["path"], "digest": dep.get("md5") or dep.get("etag") or dep.get("checksum") or ""}
        for dep in entry.get("deps", [])
        if not dep["path"].endswith(".py")
        and Path(dep["path"]).parts[0] not in ("tasks", "model")
        and Path(dep["path"]) != NOTHING
    ]
    return Identity(digest_of_entry(entry), params_of_entry(entry), data)


def digest_of_entry(entry: Mapping[str, Any]) -> str:
    """Return the digest of a stage's entry in dvc.lock, without its outputs."""
    inputs = {key: value for key, value in entry.items() if key != "outs"}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def params_of_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a stage's entry by their dotted names."""
    return flatten(entry.get("params", {}).get(str(PARAMS_FILE), {}))


def locked_fingerprints() -> set[str]:
    """Return the digests of all stages that are finished according to dvc.lock, here and one level below (studies)."""
    from ruamel.yaml import YAML

    digests: set[str] = set()
    for path in (*Path().glob("dvc.lock"), *Path().glob("*/dvc.lock")):
        lock = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
        digests |= {digest_of_entry(entry) for entry in lock.get("stages", {}).values()}
    return digests
