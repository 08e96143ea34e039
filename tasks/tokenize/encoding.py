"""Encode the corpus: each of its files becomes a file of tokens and an index of the documents in it.

Each of several processes encodes one file at a time, so memory stays bounded however large the corpus is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.progress.bar import progress_bar
from model.text.tokenizer import Tokenizer
from tasks.running.params import Machine
from tasks.workers.cluster import dask_client
from tasks.workers.finished import finish_once

ROWS_AT_ONCE = 256  # documents held in memory while reading; doesn't affect the result

Tokens = npt.NDArray[Any]  # uint16 or uint32, by the size of the vocabulary


@dataclass(frozen=True)
class Index:
    """Where the documents of one source, or pieces of them, are in the encoded parts, in the order of their ids."""

    ids: npt.NDArray[np.uint64]
    pieces: npt.NDArray[np.int32]  # which piece of its document; 0 for the first, or for a whole document
    parts: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return int(self.lengths.sum())

    def select(self, chosen: npt.NDArray[Any]) -> Index:
        """Return the chosen documents: a mask, or positions."""
        return Index(
            self.ids[chosen], self.pieces[chosen], self.parts[chosen], self.starts[chosen], self.lengths[chosen]
        )

    def cut(self, max_tokens: int) -> Index:
        """Return the documents cut into pieces of `max_tokens`; each document's last piece may be shorter."""
        counts = -(-self.lengths // max_tokens)
        whole = self.select(np.repeat(np.arange(len(self)), counts))
        pieces = np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
        offsets = pieces * max_tokens
        lengths = np.minimum(whole.lengths - offsets, max_tokens)
        return Index(whole.ids, pieces.astype(np.int32), whole.parts, whole.starts + offsets, lengths)

    def read(self, document: int, encoded: list[Tokens]) -> Tokens:
        """Return one document's tokens from the encoded parts."""
        start = self.starts[document]
        tokens: Tokens = encoded[self.parts[document]][start : start + self.lengths[document]]
        return tokens


def encode_parts(
    documents: list[Path], tokenizer: Path, directory: Path, dtype: np.dtype[Any], machine: Machine
) -> list[Path]:
    """Encode Parquet files of documents into directories below `directory`, and return these in the same order.

    What an interrupted run encoded is kept.
    """
    from distributed import as_completed

    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    results = [directory / part.stem for part in documents]
    missing = [(part, result) for part, result in zip(documents, results, strict=True) if not result.exists()]
    if not missing:
        return results
    with dask_client(machine, directory, len(missing)) as client:
        futures = [
            client.submit(
                finish_once, result, partial(encode_part, part.resolve(), tokenizer.resolve(), dtype.str), pure=False
            )
            for part, result in missing
        ]
        finished = as_completed(futures)  # type: ignore[no-untyped-call]
        with progress_bar(len(futures), "encoding", "part") as bar:
            for future in finished:
                future.result()
                bar.update()
    return results


def encode_part(documents: Path, tokenizer_path: Path, dtype: str, directory: Path) -> None:
    """Encode one Parquet file into a directory: tokens.bin, and index.parquet with one row per document."""
    import pyarrow as pa
    import pyarrow.parquet

    tokenizer = Tokenizer(tokenizer_path)
    schema = pa.schema({"id": pa.uint64(), "source": pa.string(), "start": pa.int64(), "length": pa.int64()})
    position = 0
    with (
        pyarrow.parquet.ParquetFile(documents) as file,
        pyarrow.parquet.ParquetWriter(directory / "index.parquet", schema) as index,
        (directory / "tokens.bin").open("wb") as tokens,
    ):
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=["id", "source", "text"]):
            rows = []
            for row in batch.to_pylist():
                ids = np.array(tokenizer.encode(row["text"], bos=True, eos=True), dtype)
                tokens.write(ids.tobytes())
                rows.append({"id": int(row["id"], 16), "source": row["source"], "start": position, "length": len(ids)})
                position += len(ids)
            index.write_table(pa.Table.from_pylist(rows, schema))


def open_tokens(part: Path, dtype: np.dtype[Any]) -> Tokens:
    """Return the tokens of an encoded part, mapped into memory."""
    path = part / "tokens.bin"
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def read_index(parts: list[Path]) -> dict[str, Index]:
    """Return every source's documents in the order of their ids, however they are spread over parts."""
    import pyarrow as pa
    import pyarrow.parquet

    tables = []
    for number, part in enumerate(parts):
        table = pyarrow.parquet.read_table(part / "index.parquet", read_dictionary=["source"])
        tables.append(table.append_column("part", pa.array(np.full(len(table), number, np.int32))))
    rows = pa.concat_tables(tables).to_pandas().sort_values("id", ignore_index=True)
    rows["piece"] = np.zeros(len(rows), np.int32)
    groups = {str(name): group for name, group in rows.groupby("source", observed=True)}
    columns = ("id", "piece", "part", "start", "length")
    return {name: Index(*(groups[name][column].to_numpy() for column in columns)) for name in sorted(groups)}
