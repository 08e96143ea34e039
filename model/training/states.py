"""The states that training resumes from: one for all engines, complete on disk or absent, read without pickle."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

NUM_STATES_KEPT = 2


class StateFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint files, without its trust in pickle: only tensors and plain values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Path] = []

    def create(self, info: object) -> None:
        """Begin a checkpoint."""
        self.written.clear()

    def save(self, state_dict: object, path: str) -> None:
        """Write one file."""
        torch.save(_without_enums(state_dict), path)
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        with torch.serialization.safe_globals([LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: object) -> bool:
        """End a checkpoint."""
        return True


def _without_enums(value: Any) -> Any:
    """Return a state with values in place of enum members, which Python before 3.11.4 pickles as getattr calls."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(part) for key, part in value.items()}
    return value


def save_state(engines: Mapping[str, Any], directory: Path, step: int, progress: Mapping[str, Any]) -> None:
    """Write everything that training resumes from into `directory`/step-<step>, and drop all but the newest states.

    Each engine has a subdirectory of its own name. The files reach their final place in one rename once the manifest
    holds their digests: a state is complete or absent.
    """
    rank = torch.distributed.get_rank()
    temporary = directory / ".partial"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    torch.distributed.barrier()
    mine: dict[str, str] = {}
    for name, engine in engines.items():
        engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
        mine |= {f"{name}/{path.name}": _digest(path) for path in engine.checkpoint_engine.written}
    all_digests: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(all_digests, mine)
    if rank == 0:
        files = {name: digest for digests in all_digests for name, digest in digests.items()}
        manifest = {"step": step, "num_ranks": len(all_digests), "files": files, "progress": progress}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        temporary.rename(_state(directory, step))
        for old in _states(directory)[:-NUM_STATES_KEPT]:
            shutil.rmtree(_state(directory, old))
    torch.distributed.barrier()


def load_state(engines: Mapping[str, Any], directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Restore engines to the newest state in `directory`; return its step and progress, or None if there is none.

    Raises ValueError, naming the file and what to do, for a damaged state or one written by another number of ranks.
    """
    states = _states(directory)
    if not states:
        return None
    state = _state(directory, states[-1])
    before = f"`{_state(directory, states[-2])}`" if len(states) > 1 else "the beginning"
    remedy = f"delete `{state}` to resume from {before}"
    try:
        manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
        step, num_ranks, files, progress = (manifest[key] for key in ("step", "num_ranks", "files", "progress"))
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{state / 'manifest.json'} is missing or damaged: {remedy}") from None
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if num_ranks != world:
        raise ValueError(
            f"{state} was written by {num_ranks} ranks, and this run has {world}: "
            f"set `machine.num_ranks` back, or delete `{directory}` to start over"
        )
    for name in sorted(files)[rank::world]:
        path = state / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if _digest(path) != files[name]:
            raise ValueError(f"{path} is damaged (its digest differs from the one in manifest.json): {remedy}")
    torch.distributed.barrier()
    with redirect_stdout(io.StringIO()):
        for name, engine in engines.items():
            engine.load_checkpoint(str(state), tag=name)
    return step, progress


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def _states(directory: Path) -> list[int]:
    """Return the steps of the complete states in a directory, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))
