"""What decides a stage's result, as one digest: what DVC compares, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tasks.running.params import PARAMS_FILE, flatten
from tasks.running.places import NOTHING


def fingerprint(stage_name: str) -> tuple[str, dict[str, Any], list[dict[str, str]]]:
    """Return the digest of all that decides a stage's result, its parameters, and its dependencies that are data.

    The digest covers what DVC compares: command, digests of the dependencies, parameters. These have dotted names.
    Each data dependency is `{"path", "digest"}`; code is left out of the list (but not out of the digest).
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
        raise ValueError(f"dvc.yaml's stage `{stage_name}` can't be read: {len(stages)} have that name, and one must")
    (stage,) = stages
    entry = to_single_stage_lockfile(stage)
    entry.pop("outs", None)
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()[:16]
    data = [
        {"path": dep["path"], "digest": dep.get("md5") or dep.get("etag") or dep.get("checksum") or ""}
        for dep in entry.get("deps", [])
        if not dep["path"].endswith(".py")
        and Path(dep["path"]).parts[0] not in ("tasks", "model")
        and Path(dep["path"]) != NOTHING
    ]
    return digest, flatten(entry.get("params", {}).get(str(PARAMS_FILE), {})), data
