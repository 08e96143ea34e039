"""Reading documents from outside files: JSON lines, Parquet, CSV, text, Markdown and WARC, plain, .gz or .zst.

A source names its files by globs below a root directory that DVC watches, or by http(s) URLs. Everything streams:
memory holds one partition of documents, however large the files are. A line that can't be read is yielded as
`Malformed` beside the documents, so that it is counted and kept; what concerns a whole file (missing, binary, damaged,
without the column) is a ValueError that names the file and what to do.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from tasks.running.params import Section

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["auto", "jsonl", "parquet", "csv", "text", "markdown", "lines", "warc"]
FORMATS: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".warc": "warc",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_FIELD = 1 << 28  # characters of a CSV field: a quote that is never closed must not fill the memory


class Source(Section):
    """One source of documents."""

    files: list[str] = Field(min_length=1, description="globs below the root, or http(s) URLs")
    format: Format = Field(
        description="auto: by the name's ending; text, markdown: one document per file; lines: one per line"
    )
    text_field: str | None = Field(
        description="column that holds the text (jsonl, parquet, csv); null where none is read"
    )


@dataclass(frozen=True)
class File:
    """One file of a source; `number` is its place among all files, which orders the documents of the corpus."""

    source: str
    number: int
    name: str
    location: str
    format: Format
    text_field: str | None
    num_bytes: int


class Document(NamedTuple):
    """One document as it stood in its file; rows count from 0, malformed rows too."""

    file: str
    row: int
    text: str


class Object(NamedTuple):
    """One JSON object as it stood in its file."""

    file: str
    row: int
    values: dict[str, Any]
    raw: bytes


class Malformed(NamedTuple):
    """One row that holds no readable document."""

    file: str
    row: int
    error: str
    raw: str


def is_url(name: str) -> bool:
    """Tell a URL from a path."""
    return name.startswith(("http://", "https://"))


def find_files(root: Path, sources: Mapping[str, Source], section: str) -> list[File]:
    """Return the files of all sources, ordered by source, then by pattern, then by name.

    `section` names the parameters in messages: `<section>.root`, `<section>.sources.<source>.files`.
    Raises ValueError for a missing root, a path that leaves it, a pattern that matches nothing, an empty file, a file
    of unknown format, and a format that lacks its `text_field`.
    """
    if not root.is_dir():
        raise ValueError(
            f"`{section}.root`: {root} is not a directory: correct the path, or run the stage that writes it"
        )
    found: dict[tuple[str, str], File] = {}
    for source_name, source in sources.items():
        where = f"`{section}.sources.{source_name}.files`"
        for pattern in source.files:
            for name in [pattern] if is_url(pattern) else _match(root, pattern, where):
                if (source_name, name) in found:
                    continue
                location = name if is_url(name) else str(root / name)
                num_bytes = 0 if is_url(name) else Path(location).stat().st_size
                if not is_url(name) and num_bytes == 0:
                    raise ValueError(f"{location} is empty: fill it, or take it out of {where}")
                file_format = source.format if source.format != "auto" else _format_of(name, where)
                if file_format in ("jsonl", "parquet", "csv") and source.text_field is None:
                    raise ValueError(
                        f"`{section}.sources.{source_name}.text_field` is null, but {location} has columns: "
                        "name the one that holds the text"
                    )
                found[source_name, name] = File(
                    source_name, len(found), name, location, file_format, source.text_field, num_bytes
                )
    return list(found.values())


def _match(root: Path, pattern: str, where: str) -> list[str]:
    """Return the names of the files below the root that a glob matches, sorted."""
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{where}: {pattern} leaves {root}, so DVC would not see its files change: move them below it, "
            "or set `root` higher up"
        )
    names = sorted(
        match.relative_to(root).as_posix()
        for match in root.glob(pattern)
        if match.is_file() and not match.name.startswith(".")
    )
    if not names:
        raise ValueError(f"{where}: no file matches {pattern} below {root}: correct the pattern, or bring the files")
    return names


def _suffixes(name: str) -> tuple[str, str | None]:
    """Return the ending that gives the format, and the compression if there is one."""
    path = PurePosixPath(name.split("?")[0])
    compression = COMPRESSIONS.get(path.suffix.lower())
    return (path.with_suffix("").suffix if compression else path.suffix).lower(), compression


def _format_of(name: str, where: str) -> Format:
    suffix, _ = _suffixes(name)
    if suffix not in FORMATS:
        raise ValueError(
            f"{where}: the format of {name} can't be inferred from its name (known: {', '.join(FORMATS)}, each also "
            ".gz or .zst): set the source's `format`"
        )
    return FORMATS[suffix]


def partitions(files: Iterable[File], num_bytes: int) -> Iterator[tuple[pd.DataFrame, list[Malformed]]]:
    """Stream files of one source as pandas partitions of about `num_bytes` of text in memory.

    A partition has the columns source, file_number, file, row, text; the malformed rows met on the way come with it.
    It may span small files; a document longer than `num_bytes` makes a partition of its own.
    """
    documents: list[tuple[str, int, str, int, str]] = []
    malformed: list[Malformed] = []
    size = 0
    for file in files:
        for item in read(file):
            if isinstance(item, Malformed):
                malformed.append(item)
                size += sys.getsizeof(item.raw)
            else:
                documents.append((file.source, file.number, *item))
                size += sys.getsizeof(item.text)
            if size >= num_bytes:
                yield _frame(documents), malformed
                documents, malformed, size = [], [], 0
    if documents or malformed:
        yield _frame(documents), malformed


def _frame(documents: Sequence[tuple[str, int, str, int, str]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(documents, columns=["source", "file_number", "file", "row", "text"]).astype(
        {"source": "str", "file_number": "int64", "file": "str", "row": "int64", "text": "str"}
    )


def read(file: File) -> Iterator[Document | Malformed]:
    """Stream one file's documents and malformed rows.

    Raises ValueError, naming the file and what to do, where the file as a whole can't be read.
    """
    with _naming(file):
        yield from _READERS[file.format](file)


def read_objects(file: File) -> Iterator[Object | Malformed]:
    """Stream the objects of a file of JSON lines, or of one JSON array of objects, whatever columns they have.

    Raises ValueError as `read` does.
    """
    with _naming(file):
        yield from _read_objects(file)


@contextmanager
def _naming(file: File) -> Iterator[None]:
    """Turn errors that concern the whole file into a ValueError that names it and what to do."""
    from aiohttp import ClientError

    unreachable = f"{file.location} can't be fetched: check the address and the network"
    try:
        yield
    except ClientError as error:
        raise ValueError(f"{unreachable} ({error})") from None
    except FileNotFoundError:
        gone = f"{file.location} is missing: bring it, or take it out of source `{file.source}`"
        raise ValueError(unreachable if is_url(file.location) else gone) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:  # of the temporary copy: not the file's fault
            raise
        raise ValueError(
            f"{file.location} can't be read ({error}): it may be damaged or cut off; fetch it again"
        ) from None


def _open(file: File) -> io.BufferedReader:
    """Open a file for streaming, decompressed."""
    import fsspec
    import pyarrow

    if is_url(file.location):
        raw: Any = fsspec.open(file.location, block_size=0).open()
    else:
        raw = io.FileIO(file.location)
    _, compression = _suffixes(file.name)
    if compression is not None:
        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)
    return io.BufferedReader(raw)


def _open_text(file: File) -> io.BufferedReader:
    """Open a file of text, past its byte order mark.

    Raises ValueError for a binary file.
    """
    stream = _open(file)
    head = stream.peek(1 << 13)
    control = sum(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in head)
    if b"\0" in head or control > len(head) / 10:
        raise ValueError(
            f"{file.location} is a binary file, not UTF-8 text: correct the format of source `{file.source}`, "
            "or convert the file"
        )
    if head.startswith(BYTE_ORDER_MARK):
        stream.read(len(BYTE_ORDER_MARK))
    return stream


def _readable(raw: bytes) -> str:
    """Return any bytes as text to show, with invalid UTF-8 escaped."""
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def _remember(stream: Iterable[str], lines: list[str]) -> Iterator[str]:
    """Pass lines on, and keep them to show if they make no valid row."""
    for line in stream:
        lines.append(line)
        yield line


def _shown(lines: Sequence[str]) -> str:
    return _readable("".join(lines).encode("utf-8", errors="surrogateescape"))


def _check_text(text: object, column: str) -> str | None:
    """Return what is wrong with a value that should be a document's text, or None."""
    if not isinstance(text, str):
        return f"`{column}` is {type(text).__name__}, not text"
    if not text.strip():
        return f"`{column}` is empty"
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return f"`{column}` holds bytes that are not UTF-8, or a lone surrogate"
    return None


def _wrong_column(file: File, columns: Iterable[str]) -> ValueError:
    return ValueError(
        f"{file.location} has no column `{file.text_field}`; it has: {', '.join(map(str, columns))}. Set `text_field` "
        f"of source `{file.source}` to the one that holds the text"
    )


def _read_json_lines(file: File) -> Iterator[Document | Malformed]:
    """Yield the text of each object."""
    assert file.text_field is not None
    seen_column = False
    for item in _read_objects(file):
        if isinstance(item, Malformed):
            yield item
            continue
        if file.text_field not in item.values:
            if not seen_column:
                raise _wrong_column(file, item.values)
            yield Malformed(file.name, item.row, f"no field `{file.text_field}`", _readable(item.raw))
            continue
        seen_column = True
        text = item.values[file.text_field]
        error_text = _check_text(text, file.text_field)
        if error_text is not None:
            yield Malformed(file.name, item.row, error_text, _readable(item.raw))
        else:
            yield Document(file.name, item.row, text)


def _read_objects(file: File) -> Iterator[Object | Malformed]:
    """Yield one JSON object per line, skipping blank lines; or, in a .json file, the objects of one array."""
    row = -1
    with _open_text(file) as stream:
        for line in _elements(file, stream) if _suffixes(file.name)[0] == ".json" else stream:
            if line.isspace():
                continue
            row += 1
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield Malformed(file.name, row, f"invalid JSON: {error}", _readable(line))
                continue
            if not isinstance(value, dict):
                yield Malformed(file.name, row, f"a JSON {type(value).__name__}, not an object", _readable(line))
                continue
            yield Object(file.name, row, value, line)


def _elements(file: File, stream: IO[bytes]) -> list[bytes]:
    """Return the elements of an array as lines of JSON."""
    try:
        values = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.location} is not valid JSON: {error}; name it .jsonl if it holds one object per line"
        ) from None
    if not isinstance(values, list):
        raise ValueError(f"{file.location} holds a JSON {type(values).__name__}, not an array of objects")
    return [json.dumps(value).encode() for value in values]


def _read_csv(file: File) -> Iterator[Document | Malformed]:
    """Yield the documents of a CSV file (RFC 4180) with a header; a text may span lines."""
    assert file.text_field is not None
    csv.field_size_limit(LONGEST_FIELD)
    lines: list[str] = []  # of the row that is being read
    with io.TextIOWrapper(_open_text(file), encoding="utf-8", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(_remember(stream, lines), strict=True)
        columns = next(reader, [])
        if file.text_field not in columns:
            raise _wrong_column(file, columns)
        index = columns.index(file.text_field)
        row = -1
        while True:
            row += 1
            lines.clear()
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Malformed(file.name, row, f"invalid CSV: {error} (line {reader.line_num})", _shown(lines))
                continue
            if not values:  # a blank line is not a row
                row -= 1
                continue
            error_text = (
                f"{len(values)} columns, the header has {len(columns)}"
                if len(values) != len(columns)
                else _check_text(values[index], file.text_field)
            )
            if error_text is not None:
                yield Malformed(file.name, row, error_text, _shown(lines))
            else:
                yield Document(file.name, row, values[index])


def _read_parquet(file: File) -> Iterator[Document | Malformed]:
    """Yield the documents by row group. A file compressed again, or from a URL, is first copied to a temporary file."""
    import pyarrow
    import pyarrow.parquet

    assert file.text_field is not None
    rows_a_batch, buffer_bytes = 256, 1 << 20  # how much of a row group is in memory at a time
    with tempfile.TemporaryFile() as copy, _open(file) as stream:
        handle: IO[bytes] = stream
        if not stream.seekable() or is_url(file.location):
            shutil.copyfileobj(stream, copy)
            handle = copy
        try:
            parquet = pyarrow.parquet.ParquetFile(handle, buffer_size=buffer_bytes)
            if file.text_field not in parquet.schema_arrow.names:
                raise _wrong_column(file, parquet.schema_arrow.names)
            row = 0
            for batch in parquet.iter_batches(rows_a_batch, columns=[file.text_field]):
                for value in batch.column(0):
                    try:
                        text: object = value.as_py()
                        error = _check_text(text, file.text_field)
                    except UnicodeDecodeError as decode_error:
                        text, error = None, f"`{file.text_field}`: {decode_error}"
                    if error is not None:
                        yield Malformed(file.name, row, error, repr(text) if text is not None else "")
                    else:
                        yield Document(file.name, row, str(text))
                    row += 1
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file.location} is not a readable Parquet file ({error}): fetch it again") from None


def _read_whole(file: File) -> Iterator[Document | Malformed]:
    """Yield a text or Markdown file as one document."""
    with _open_text(file) as stream:
        yield from _decode(file, 0, stream.read())


def _read_lines(file: File) -> Iterator[Document | Malformed]:
    """Yield each line as one document, skipping blank lines."""
    row = 0
    with _open_text(file) as stream:
        for line in stream:
            if not line.isspace():
                yield from _decode(file, row, line.rstrip(b"\r\n"))
                row += 1


def _decode(file: File, row: int, raw: bytes) -> Iterator[Document | Malformed]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Malformed(file.name, row, f"invalid UTF-8: {error}", _readable(raw))
        return
    if text.strip():
        yield Document(file.name, row, text)
    else:
        yield Malformed(file.name, row, "the file holds only whitespace", _readable(raw))


def _read_warc(file: File) -> Iterator[Document | Malformed]:
    """Yield the text of each HTML page that was fetched with status 200; a page without text is an empty document."""
    import trafilatura
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    logging.getLogger("trafilatura").setLevel(logging.ERROR)  # it warns about each page without text
    row = 0
    with _open(file) as stream:
        try:
            for record in ArchiveIterator(stream):
                headers = record.http_headers
                if record.rec_type != "response" or headers is None or headers.get_statuscode() != "200":
                    continue
                if "html" not in (headers.get_header("Content-Type") or "").lower():
                    continue
                page = record.content_stream().read()
                text = trafilatura.extract(page, include_comments=False)
                yield Document(file.name, row, text or "")
                row += 1
        except ArchiveLoadFailed as error:
            raise ValueError(f"{file.location} is not a readable WARC file ({error}): fetch it again") from None


_READERS: Mapping[str, Callable[[File], Iterator[Document | Malformed]]] = {
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "csv": _read_csv,
    "text": _read_whole,
    "markdown": _read_whole,
    "lines": _read_lines,
    "warc": _read_warc,
}
