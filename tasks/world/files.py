"""Write the corpus as files in several formats, byte for byte the same for the same documents.

No file depends on the clock: gzip has no date, WARC has invented dates, and record ids drawn from the seed.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.world.documents import Document

Placed = list[tuple[str, int, Document]]  # file, relative to the corpus; row; document


def lines_of(documents: Sequence[Document]) -> bytes:
    """Return documents as JSON lines; a malformed one is cut off in the middle of its text."""
    lines = []
    for document in documents:
        line = json.dumps({"text": document.text}, ensure_ascii=False)
        lines.append(line.removesuffix('"}') if document.malformed else line)
    return ("\n".join(lines) + "\n").encode()


def one_file(name: str, documents: Sequence[Document]) -> Placed:
    """Return the places of documents that share a file."""
    return [(name, row, document) for row, document in enumerate(documents)]


def write_gzip_lines(corpus: Path, name: str, documents: Sequence[Document]) -> Placed:
    """Write NAME.jsonl.gz."""
    file = f"{name}.jsonl.gz"
    (corpus / file).write_bytes(gzip.compress(lines_of(documents), mtime=0))
    return one_file(file, documents)


def write_zstandard_lines(corpus: Path, name: str, documents: Sequence[Document]) -> Placed:
    """Write NAME.jsonl.zst."""
    import zstandard

    file = f"{name}.jsonl.zst"
    (corpus / file).write_bytes(zstandard.ZstdCompressor().compress(lines_of(documents)))
    return one_file(file, documents)


def write_lines(corpus: Path, name: str, documents: Sequence[Document]) -> Placed:
    """Write NAME.jsonl."""
    file = f"{name}.jsonl"
    (corpus / file).write_bytes(lines_of(documents))
    return one_file(file, documents)


def write_csv(corpus: Path, name: str, documents: Sequence[Document]) -> Placed:
    """Write NAME.csv with the columns number and text."""
    file = f"{name}.csv"
    with (corpus / file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["number", "text"])
        writer.writerows([row, document.text] for row, document in enumerate(documents))
    return one_file(file, documents)


def write_parquet(corpus: Path, name: str, documents: Sequence[Document]) -> Placed:
    """Write NAME.parquet with the column text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = f"{name}.parquet"
    pq.write_table(pa.table({"text": [document.text for document in documents]}), corpus / file)
    return one_file(file, documents)


def write_folder(corpus: Path, name: str, documents: Sequence[Document], suffix: str) -> Placed:
    """Write NAME/0000.SUFFIX and so on, one document per file."""
    (corpus / name).mkdir()
    placed = []
    for number, document in enumerate(documents):
        file = f"{name}/{number:04d}.{suffix}"
        (corpus / file).write_bytes(document.text.encode())
        placed.append((file, 0, document))
    return placed


def write_pages(
    corpus: Path, name: str, documents: Sequence[Document], texts: Mapping[str, Any], generator: random.Random
) -> Placed:
    """Write NAME.warc.gz: one page per response record, each text inside navigation, banners and a footer.

    The banner and the footer of a page are labelled as boilerplate.
    """
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    file = f"{name}.warc.gz"
    with (corpus / file).open("wb") as stream:
        writer = WARCWriter(stream, gzip=True)
        for number, document in enumerate(documents):
            body = page(document, texts, generator).encode()
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            identity = uuid.UUID(int=generator.getrandbits(128), version=4)
            moment = f"2023-{1 + number % 12:02d}-{1 + number % 28:02d}T{number % 24:02d}:{number % 60:02d}:00Z"
            record = writer.create_warc_record(
                f"https://valley.example/{number}.html",
                "response",
                payload=io.BytesIO(body),
                length=len(body),
                http_headers=headers,
                warc_headers_dict={"WARC-Record-ID": f"<urn:uuid:{identity}>", "WARC-Date": moment},
            )
            writer.write_record(record)
    return one_file(file, documents)


def page(document: Document, texts: Mapping[str, Any], generator: random.Random) -> str:
    """Return a document as an HTML page with everything that surrounds a text on the web."""
    banner, footer = generator.choice(texts["banners"]), generator.choice(texts["footers"])
    links = generator.sample(texts["navigation"], 5)
    site = generator.choice(texts["sites"])
    first, *rest = document.text.split("\n\n")
    title, paragraphs = (first, rest) if rest and not first.endswith((".", "?", "!")) else (site, [first, *rest])
    title = title.removeprefix("# ")
    document.labels.append({"kind": "boilerplate", "lines": [banner, footer]})
    items = "".join(f'<li><a href="/{index}">{html.escape(link)}</a></li>' for index, link in enumerate(links))
    body = "\n".join(f"<p>{html.escape(text, quote=False)}</p>".replace("\n", "<br>\n") for text in paragraphs)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} - {site}</title></head>
<body>
<header><p>{site}</p><nav><ul>{items}</ul></nav></header>
<div class="cookie-banner"><p>{banner}</p></div>
<main><article><h1>{html.escape(title)}</h1>
{body}
</article></main>
<aside class="sidebar"><ul>{items}</ul></aside>
<footer><p>{footer}</p></footer>
</body></html>
"""


WRITERS: Mapping[str, Callable[[Path, str, Sequence[Document]], Placed]] = {
    "encyclopedia": write_gzip_lines,
    "stories": lambda corpus, name, documents: write_folder(corpus, name, documents, "md"),
    "howto": write_csv,
    "dialogue": write_parquet,
    "arithmetic": write_zstandard_lines,
    "lists": lambda corpus, name, documents: write_folder(corpus, name, documents, "txt"),
}
