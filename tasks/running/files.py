"""The project's own files: JSON, written completely or not at all, and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see the old content or the new, never a part, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return the content of one of the project's own JSON files.

    Raises ValueError, naming it, when it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}), perhaps by a power cut: delete `{path.parent}` and run again"
        ) from None


def read_lines(path: Path) -> list[Any]:
    """Return the lines of one of the project's own JSON lines files, decoded."""
    with path.open(encoding="utf-8") as file:  # not str.splitlines, which also splits at other characters
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines; a lone surrogate, which UTF-8 can't encode, becomes a JSON escape."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
