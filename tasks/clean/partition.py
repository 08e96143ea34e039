"""The work of a Dask worker: stream partitions of some files through the rules, later separate kept from rejected.

Rules, in order: Unicode repair, language, lines and pages (C4), words (Gopher), repetition (Gopher), exact
duplicates, near-duplicates, personal data. The first that a document breaks rejects it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tasks.clean.duplicates import Deduplication, save
from tasks.clean.language import Identification, identify
from tasks.clean.personal_data import TYPES, PersonalData, find_personal_data, is_rich, mask
from tasks.clean.quality import C4, Gopher, Verdict, drop_lines, judge_page, judge_words
from tasks.clean.repair import repair
from tasks.clean.repetition import Repetition, judge_repetition
from tasks.reading.sources import File, Malformed, Source, is_url, partitions
from tasks.running.files import write_json
from tasks.running.params import Section
from tasks.workers.finished import finish_once

if TYPE_CHECKING:
    import pandas as pd

ROW_BITS = 36  # a document's number combines its file's number and its row: files come in the sources' order
UNDETERMINED = "und"  # ISO 639-2: the language was not checked

KEPT_COLUMNS = [
    "id",
    "source",
    "file",
    "row",
    "text",
    "language",
    "language_score",
    "num_words",
    "num_characters_read",
    "num_lines_dropped",
    "repaired",
    *[f"masked_{kind}" for kind in TYPES],
    "personal_data_masked",
]
REJECTED_COLUMNS = [
    "id",
    "source",
    "file",
    "row",
    "text",
    "rule",
    "detail",
    "language",
    "language_score",
    "num_characters_read",
    "repaired",
]


class Rules(Section):
    """One set of rules; sources of one kind share it."""

    languages: list[str] | None = Field(min_length=1, description="languages to keep; null: any (program code)")
    unescape_html: bool = Field(description="decode HTML's escapes (&amp;) in documents without tags")
    c4: C4
    gopher: Gopher
    repetition: Repetition


class RuledSource(Source):
    """A source of documents, and the rules that they must pass."""

    rules: str = Field(description="a key of `clean.rules`")


class Params(Section):
    """Parameters of stage `clean`."""

    root: str = Field(min_length=1, description="directory that DVC watches; source files are below it")
    sources: dict[str, RuledSource] = Field(min_length=1, description="sources by name, in order of precedence")
    rules: dict[str, Rules] = Field(min_length=1, description="sets of rules by name")
    boilerplate_terms: list[str] = Field(description="what marks a line as boilerplate, in lower case")
    stop_words: dict[str, list[str]] = Field(description="stop words by language; a language without a list passes")
    language: Identification
    deduplication: Deduplication
    personal_data: PersonalData
    max_malformed_share: float = Field(ge=0, le=1, description="share of a source's rows; more stops the stage")
    partition_megabytes: float = Field(gt=0, description="MB of text that a worker holds at a time")


@dataclass(frozen=True)
class Part:
    """One cleaned partition, before duplicates are known: its directory and counts."""

    path: str
    source: str
    first: int  # number of its first document; -1 where it has none
    last: int
    num_documents: int
    num_survivors: int
    num_malformed: int
    first_malformed: Malformed | None

    @property
    def name(self) -> str:
        """Name of the partition in the corpus's order."""
        return Path(self.path).name


def clean_files(files: Sequence[File], prefix: str, params: Params, seed: int) -> list[Part]:
    """Clean files of one source partition by partition, as far as each document can be judged by itself.

    Each partition becomes the directory `<prefix>-<number>`. What an earlier run finished is kept; a URL that it only
    began is cleaned again, as its text may have changed.
    """
    finished = Path(f"{prefix}.json")  # how many partitions the files made
    if not finished.exists():
        if is_url(files[0].location):
            for begun in finished.parent.glob(f"{finished.stem}-*"):
                shutil.rmtree(begun)
        num_parts = 0
        for frame, malformed in partitions(files, int(params.partition_megabytes * 1e6)):
            fill = partial(clean_partition, frame, malformed, files[0].source, params, seed)
            finish_once(Path(f"{prefix}-{num_parts:05d}"), fill)
            num_parts += 1
        write_json(finished, num_parts)
    num_parts = json.loads(finished.read_text(encoding="utf-8"))
    return [read_counts(Path(f"{prefix}-{index:05d}")) for index in range(num_parts)]


def clean_partition(
    frame: pd.DataFrame, malformed: Sequence[Malformed], source: str, params: Params, seed: int, directory: Path
) -> None:
    """Write all of a partition's documents, its malformed rows, the survivors' signatures, and counts.json."""
    with (directory / "malformed.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row._asdict()) + "\n" for row in malformed)
    num_survivors = 0
    if len(frame):
        judged = judge(frame, params)
        survivors = judged[judged["rule"] == ""]
        num_survivors = len(survivors)
        save(directory, survivors["text"].tolist(), document_numbers(survivors), seed, params.deduplication)
        masked = mask_partition(judged, params.personal_data)
        masked.to_parquet(directory / "documents.parquet", compression="zstd", index=False)
    numbers = document_numbers(frame).tolist() or [-1]
    counts = {
        "source": source,
        "first": numbers[0],
        "last": numbers[-1],
        "num_documents": len(frame),
        "num_survivors": num_survivors,
        "num_malformed": len(malformed),
        "first_malformed": malformed[0] if malformed else None,
    }
    write_json(directory / "counts.json", counts)


def read_counts(directory: Path) -> Part:
    """Return a cleaned partition with its counts."""
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    first = counts.pop("first_malformed")
    return Part(path=str(directory), first_malformed=Malformed(*first) if first else None, **counts)


def document_numbers(frame: pd.DataFrame) -> NDArray[np.int64]:
    """Return a number for each document that orders the corpus: its file's number, then its row."""
    file_numbers: NDArray[np.int64] = frame["file_number"].to_numpy(dtype=np.int64)
    rows: NDArray[np.int64] = frame["row"].to_numpy(dtype=np.int64)
    return file_numbers << ROW_BITS | rows


def judge(frame: pd.DataFrame, params: Params) -> pd.DataFrame:
    """Repair a partition's documents and apply the rules on single documents; `rule` is "" for those that pass."""
    import pandas as pd

    rules = params.rules[params.sources[frame["source"].iloc[0]].rules]
    judged = pd.DataFrame([judge_document(text, rules, params) for text in frame["text"]])
    return pd.concat([frame.drop(columns="text"), judged], axis="columns")


def judge_document(raw: str, rules: Rules, params: Params) -> dict[str, Any]:
    """Return one document's columns: repaired text, what was measured, and the rule that rejects it or ""."""
    text, repaired = repair(raw, rules.unescape_html)
    language, score, num_dropped, words = UNDETERMINED, 0.0, 0, text.split()
    verdict: Verdict = None if words else ("empty", "no text")
    if verdict is None and rules.languages is not None:
        language, score = identify(text, rules.languages, params.language)
        if language not in rules.languages or score < params.language.min_score:
            verdict = "language", f"{language} {score:.2f}"
    if verdict is None:
        cleaned, num_dropped = drop_lines(text, params.boilerplate_terms, rules.c4)
        verdict = judge_page(cleaned, num_dropped, rules.c4)
        if verdict is None:  # a rejected page is kept as it was
            words = cleaned.split() if num_dropped else words
            text = cleaned
            verdict = judge_words(text, words, language, params.stop_words, rules.gopher)
    if verdict is None:
        verdict = judge_repetition(text, words, rules.repetition)
    rule, detail = verdict or ("", "")
    return {
        "id": hashlib.sha256(raw.encode()).hexdigest()[:16],
        "text": text,
        "rule": rule,
        "detail": detail,
        "language": language,
        "language_score": round(score, 4),
        "num_words": len(words),
        "num_characters_read": len(raw),
        "num_lines_dropped": num_dropped,
        "repaired": repaired,
    }


def mask_partition(judged: pd.DataFrame, params: PersonalData) -> pd.DataFrame:
    """Mask the survivors' personal data or, if a document is rich in it, say so in the column `rich`."""
    import pandas as pd

    columns: dict[str, list[Any]] = {name: [] for name in ["text", "rich", *[f"masked_{kind}" for kind in TYPES]]}
    for rule, text, num_words in zip(judged["rule"], judged["text"], judged["num_words"], strict=True):
        finds = find_personal_data(text, params) if rule == "" else []
        rich = is_rich(len(finds), num_words, params)
        columns["text"].append(text if rich else mask(text, finds))
        columns["rich"].append(f"{len(finds)} in {num_words} words" if rich else "")
        for kind in TYPES:
            columns[f"masked_{kind}"].append(0 if rich else sum(find[2] == kind for find in finds))
    masked = judged.assign(**{name: pd.Series(values, index=judged.index) for name, values in columns.items()})
    return masked.assign(personal_data_masked=masked[[f"masked_{kind}" for kind in TYPES]].sum(axis="columns"))


def part_documents(part: Part, duplicates: pd.DataFrame, parted: Path) -> pd.DataFrame:
    """Separate one partition's kept documents from the rejected; return counts by source and rule ("" is kept).

    Writes documents.parquet, rejected.parquet (each if it has a row) and counts.parquet into the partition's directory
    below `parted`, and keeps what an earlier run finished. `duplicates` holds this partition's rows of what
    `find_duplicates` returned: document, rule, detail.
    """
    import pandas as pd

    finish_once(parted / part.name, partial(write_parted, part, duplicates))
    return pd.read_parquet(parted / part.name / "counts.parquet")


def write_parted(part: Part, duplicates: pd.DataFrame, directory: Path) -> None:
    """Write one partition's kept and rejected documents, and their counts."""
    import pandas as pd

    measures = ["num_characters_read", "num_characters", "num_words", "repaired", "num_lines_dropped"]
    documents = pd.read_parquet(Path(part.path) / "documents.parquet")
    by_number = duplicates.set_index("document").reindex(document_numbers(documents))
    is_duplicate = by_number["rule"].notna().to_numpy()
    is_rich = (documents["rich"] != "").to_numpy() & ~is_duplicate
    documents.loc[is_duplicate, "rule"] = by_number["rule"].to_numpy()[is_duplicate]
    documents.loc[is_duplicate, "detail"] = by_number["detail"].to_numpy()[is_duplicate]
    documents.loc[is_rich, "rule"] = "personal_data"
    documents.loc[is_rich, "detail"] = documents.loc[is_rich, "rich"]
    kept = documents["rule"] == ""
    for rows, columns, name in (
        (documents[kept], KEPT_COLUMNS, "documents"),
        (documents[~kept], REJECTED_COLUMNS, "rejected"),
    ):
        if len(rows):
            rows[columns].to_parquet(directory / f"{name}.parquet", compression="zstd", index=False)
    counted = documents.assign(num_characters=documents["text"].str.len(), num_documents=1)
    sums = ["num_documents", *measures, *[f"masked_{kind}" for kind in TYPES]]
    counts = counted.groupby(["source", "rule"], as_index=False)[sums].sum()
    counts.to_parquet(directory / "counts.parquet", index=False)
