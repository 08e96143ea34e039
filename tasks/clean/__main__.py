"""Stage `clean`: documents of all sources in, those worth learning from out (recipe section 1).

Reads the files that `clean.sources` names below `clean.root`. Writes, below data/clean:

- documents/part-*.parquet     the kept documents
- rejected/part-*.parquet      every rejected document, with the `rule` that rejected it and the `detail` it found
- malformed.jsonl              rows that hold no readable document: file, row, error, raw
- plots/funnel.csv             documents of each source that are left after each rule

Three steps on Dask, each of which holds at most one partition of the corpus per worker: judge each document by itself
and compute its signature; find duplicates from the signatures; separate kept from rejected documents. The result
depends on neither the number of workers nor the size of a partition. A killed run resumes from the partitions finished
in a step; only the search for duplicates, the shortest step, restarts as a whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from model.progress.bar import progress_bar
from tasks.clean.duplicates import Deduplication, find_duplicates, write_index
from tasks.clean.language import check_languages
from tasks.clean.partition import ROW_BITS, Params, Part, clean_files, part_documents
from tasks.clean.report import FUNNEL, funnel_of, metrics, plot_funnel
from tasks.clean.score import score
from tasks.reading.sources import File, find_files, is_url
from tasks.running.stage import Stage, start
from tasks.workers.cluster import dask_client
from tasks.workers.finished import finish_once, link


def run(stage: Stage[Params]) -> dict[str, float]:
    """Clean the corpus; return counts by source and, where the truth is known, precision and recall.

    Raises ValueError for a source that can't be read, holds nothing or too many malformed rows, and for rules that
    leave nothing.
    """
    import pandas as pd

    params = stage.params
    check(params)
    files = find_files(Path(params.root), params.sources, "clean")
    cleaned_folder, parted_folder = stage.scratch / "cleaned", stage.scratch / "parted"
    for folder in (cleaned_folder, parted_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("documents", "rejected"):
        (stage.output / name).mkdir(parents=True)

    groups = list(group_files(files, params.partition_megabytes * 1e6))
    with dask_client(stage.machine, stage.scratch, len(groups)) as client:
        cleaned = client.map(
            clean_files,
            groups,
            [str(cleaned_folder / f"{index:05d}") for index in range(len(groups))],
            params=params,
            seed=stage.seed,
            pure=False,
        )
        sizes = [sum(file.num_bytes for file in group) for group in groups]
        parts = [part for found in gather(cleaned, sizes, "clean", "B") for part in found]
        write_malformed(parts, stage.output / "malformed.jsonl")
        check_malformed(parts, params)

        signed = [part for part in parts if part.num_survivors]
        if not signed:
            raise ValueError(
                "`clean.rules` reject every document: loosen them, starting with a small sample of one source"
            )
        write_index(cleaned_folder, [part.path for part in signed], [part.first for part in signed])
        found = stage.scratch / "duplicates"
        finish_once(found, partial(write_duplicates, cleaned_folder, len(signed), params.deduplication))
        duplicates = pd.read_parquet(found / "duplicates.parquet")
        names = {file.number: file.name for file in files}
        duplicates["detail"] = [
            f"copy of {names[first >> ROW_BITS]}, row {first & ((1 << ROW_BITS) - 1)}" for first in duplicates["first"]
        ]

        filled = [part for part in parts if part.num_documents]
        bounds = duplicates["document"].searchsorted([part.first for part in filled])
        ends = duplicates["document"].searchsorted([part.last for part in filled], side="right")
        slices = [duplicates.iloc[start:end] for start, end in zip(bounds, ends, strict=True)]
        parted = client.map(part_documents, filled, slices, parted=parted_folder, pure=False)
        counts = pd.concat(gather(parted, [1] * len(filled), "kept and rejected", "part"))

    for part in filled:
        for name in ("documents", "rejected"):
            written = parted_folder / part.name / f"{name}.parquet"
            if written.exists():
                link(written, stage.output / name / f"part-{part.name}.parquet")
    counts = counts.groupby(["source", "rule"], as_index=False).sum()
    funnel = funnel_of(counts, list(params.sources))
    stage.plot("funnel", funnel, FUNNEL)
    plot_funnel(funnel, stage.artifacts / "funnel.png")
    funnel.to_csv(stage.tables / "funnel.csv", index=False)
    counts.to_csv(stage.tables / "documents_by_rule.csv", index=False)
    figures = metrics(counts, parts)
    labels = Path(params.root) / "labels.jsonl"
    return {**figures, **score(labels, stage.output)} if labels.exists() else figures


def check(params: Params) -> None:
    """Raise ValueError for rules that a source names but don't exist, and for languages that can't be identified."""
    for name, source in params.sources.items():
        if source.rules not in params.rules:
            raise ValueError(
                f"`clean.sources.{name}.rules` is {source.rules!r}: choose one of {', '.join(params.rules)}"
            )
    check_languages(
        params.language.candidates, [code for rule in params.rules.values() for code in rule.languages or []]
    )


def group_files(files: Sequence[File], num_bytes: float) -> Iterator[list[File]]:
    """Yield what one task reads: neighbouring small files of one source together, a large file or a URL alone."""
    group: list[File] = []
    for file in files:
        full = sum(member.num_bytes for member in group) + file.num_bytes > num_bytes
        if group and (full or file.source != group[0].source or is_url(file.location) or is_url(group[0].location)):
            yield group
            group = []
        group.append(file)
    yield group


def gather(futures: Sequence[Any], sizes: Sequence[int], title: str, unit: str) -> list[Any]:
    """Wait for results, in order, and show how many of the `sizes` are done and how long the rest will take."""
    from distributed import as_completed

    size_of = {future.key: size for future, size in zip(futures, sizes, strict=True)}
    with progress_bar(sum(sizes), title, unit, scaled=True) as bar:
        for future in as_completed(futures, raise_errors=False):  # type: ignore[no-untyped-call]
            if future.status == "error":
                future.result()
            bar.update(size_of[future.key])
    return [future.result() for future in futures]


def write_duplicates(cleaned: Path, num_partitions: int, params: Deduplication, directory: Path) -> None:
    """Write duplicates.parquet: the documents to reject, as `find_duplicates` returns them."""
    find_duplicates(cleaned, num_partitions, params).to_parquet(directory / "duplicates.parquet", index=False)


def write_malformed(parts: Sequence[Part], path: Path) -> None:
    """Join the partitions' malformed rows, in the corpus's order."""
    with path.open("wb") as joined:
        for part in parts:
            with (Path(part.path) / "malformed.jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, joined)


def check_malformed(parts: Sequence[Part], params: Params) -> None:
    """Raise ValueError for a source without documents, or with more malformed rows than allowed."""
    for name in params.sources:
        own = [part for part in parts if part.source == name]
        num_malformed = sum(part.num_malformed for part in own)
        num_rows = num_malformed + sum(part.num_documents for part in own)
        if num_rows == 0:
            raise ValueError(f"`clean.sources.{name}` holds no documents: fill its files, or take the source out")
        share = num_malformed / num_rows
        if share > params.max_malformed_share:
            first = next(part.first_malformed for part in own if part.first_malformed is not None)
            raise ValueError(
                f"`clean.sources.{name}`: {num_malformed} of {num_rows} rows are malformed, more than "
                f"`clean.max_malformed_share` ({params.max_malformed_share:g}). The first is row {first.row} of "
                f"{first.file}: {first.error}. Fix the file, or raise the share"
            )


if __name__ == "__main__":
    start(Params, run)
