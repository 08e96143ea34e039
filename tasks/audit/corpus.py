"""The cleaned corpus, one part at a time: counts of documents that add up in any order.

Each part is a Parquet file that a Dask worker streams in batches. Its result is small and additive, so the corpus may
be of any size and the parts may be done in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.progress.bar import progress_bar
from tasks.running.files import write_json

DOCUMENTS = Path("data/clean/documents")
COLUMNS = ["id", "source", "text", "language"]
UNKNOWN = "unknown"
EVERYWHERE = "all"  # stands for the sum over all sources

Name = tuple[str, str]  # what is counted: (measure, name), for example ("pronouns", "she")
Counts = Counter[tuple[str, str, str]]  # (source, measure, name) -> documents
Result = tuple[Counts, list[tuple[float, str]]]  # of a part: its counts, and sentences drawn from it


def find_parts(directory: Path) -> list[Path]:
    """Return the corpus's Parquet files in order. Raises ValueError when there are none."""
    parts = sorted(directory.glob("part-*.parquet"))
    if not parts:
        raise ValueError(f"{directory} holds no part-*.parquet: run `dvc repro clean` first")
    return [part.resolve() for part in parts]


def read_part(path: Path, batch_documents: int) -> Iterator[list[dict[str, Any]]]:
    """Yield a part's documents in batches; a document without a language has the language `unknown`.

    Raises ValueError, naming the file, when it is not a Parquet file, lacks a column, or has a source with the name
    that stands for all sources.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} can't be read as Parquet ({error}): recreate it, `dvc repro -f clean`") from None
    with file:
        missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path} has no column `{'`, `'.join(missing)}`: recreate it, `dvc repro -f clean`")
        for batch in file.iter_batches(batch_documents, columns=COLUMNS):
            documents = batch.to_pylist()
            for document in documents:
                document["language"] = document["language"] or UNKNOWN
                if document["source"] == EVERYWHERE:
                    raise ValueError(f"{path}: no source can be called `{EVERYWHERE}`: rename it in `clean.sources`")
            yield documents


def fraction_of(purpose: str, seed: int, document: str) -> float:
    """Return a number from 0 to below 1, determined by purpose, seed and the document's id, for drawing documents.

    The hash is not that of tasks/running/digests.py, which would draw other sentences and change the audit's figures.
    """
    digest = hashlib.blake2b(f"{purpose} {seed} {document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def over_parts(
    client: Any, function: Callable[[Path, Any], Result], parts: list[Path], shared: Any, finished: Path
) -> Iterator[Result]:
    """Yield `function(part, shared)` of every part, in the order in which the workers finish them.

    Results are kept below `finished`; those that an earlier run left there are reused.
    """
    from distributed import as_completed

    everywhere = client.scatter(shared, broadcast=True, hash=False)
    results = [finished.resolve() / f"{part.stem}.json" for part in parts]
    futures = client.map(finish_part, parts, results, function=function, shared=everywhere, pure=False)
    completed = as_completed(futures)  # type: ignore[no-untyped-call]
    with progress_bar(len(parts), finished.name, "part") as bar:
        for future in completed:
            yield future.result()
            future.release()
            bar.update()


def finish_part(part: Path, result: Path, function: Callable[[Path, Any], Result], shared: Any) -> Result:
    """Return `function(part, shared)`, from the file `result` if an earlier run left it there."""
    if not result.exists():
        counts, drawn = function(part, shared)
        write_json(result, {"counts": [[*name, number] for name, number in counts.items()], "drawn": drawn})
    found = json.loads(result.read_text(encoding="utf-8"))
    counts = Counter({(source, measure, name): number for source, measure, name, number in found["counts"]})
    return counts, [(number, text) for number, text in found["drawn"]]
