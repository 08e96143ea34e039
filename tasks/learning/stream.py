"""The output of the stage tokenize: the stream of tokens to train on, and each source's held-out documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.network.packing import Shards, Starts


@dataclass(frozen=True)
class Text:
    """Tokens, the starts of documents in them, and each document's `source` and `id` (a pyarrow table)."""

    tokens: Shards
    starts: Starts
    origins: Any

    def documents_in(self, begin: int, end: int) -> list[dict[str, str]]:
        """Return source and id of the documents that the tokens `begin` to `end` come from."""
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right")
        rows: list[dict[str, str]] = self.origins.slice(first - 1, last - first + 1).to_pylist()
        return rows


def read_stream(directory: Path) -> tuple[Text, dict[str, Text]]:
    """Return the stream to train on, and each source's held-out documents.

    Raises ValueError, naming the file, when one is missing or damaged.
    """
    import pyarrow.compute
    import pyarrow.parquet

    def tables(name: str) -> Any:
        try:
            return pyarrow.parquet.read_table(directory / name, columns=["start", "source", "id"], memory_map=True)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(f"{directory / name} cannot be read: {error}; run `dvc repro tokenize`") from None

    def text(paths: list[Path], table: Any) -> Text:
        return Text(Shards([read_tokens(path) for path in paths]), table["start"].to_numpy(), table)

    shards = sorted(directory.glob("train-*.npy"))
    if not shards:
        raise ValueError(f"{directory} holds no train-*.npy: run `dvc repro tokenize`")
    held_out = tables("validation.parquet")
    validation = {}
    for path in sorted(directory.glob("validation-*.npy")):
        source = path.stem.removeprefix("validation-")
        validation[source] = text([path], held_out.filter(pyarrow.compute.equal(held_out["source"], source)))
    return text(shards, tables("documents.parquet")), validation


def read_tokens(path: Path) -> npt.NDArray[Any]:
    """Return a file of tokens, memory-mapped."""
    try:
        tokens: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; run `dvc repro tokenize`") from None
    return tokens
