import errno
import gzip
import http.server
import io
import json
import re
import threading
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from tasks.reading.sources import Document, File, Malformed, Source, find_files, partitions, read

TEXTS = ["The first text, with a comma.", "A second one\nof two lines.", "Größe, 漢字, and “quotes”."]


def source(*files, format="auto", text_field="text"):
    return Source(files=list(files), format=format, text_field=text_field)


def rows_of(root, *files, **options):
    found = find_files(root, {"own": source(*files, **options)}, "clean")
    return [item for file in found for item in read(file)]


def texts_of(root, *files, **options):
    items = rows_of(root, *files, **options)
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts).encode()


def pack(data, ending):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending](data)


def parquet(texts):
    buffer = io.BytesIO()
    pd.DataFrame({"text": texts, "n": range(len(texts))}).to_parquet(buffer, row_group_size=2)
    return buffer.getvalue()


def warc(pages):
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=False)
    for number, (status, kind, body) in enumerate(pages):
        headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.0")
        url = f"https://example.org/{number}"
        writer.write_record(
            writer.create_warc_record(url, "response", payload=io.BytesIO(body.encode()), http_headers=headers)
        )
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_table_format_gives_back_the_texts_written(tmp_path, kind, ending):
    data = {
        "jsonl": json_lines(TEXTS),
        "csv": pd.DataFrame({"n": [1, 2, 3], "text": TEXTS}).to_csv(index=False).encode(),
        "parquet": parquet(TEXTS),
    }[kind]
    (tmp_path / f"a.{kind}{ending}").write_bytes(pack(data, ending))
    items = rows_of(tmp_path, f"a.{kind}{ending}")
    assert items == [Document(f"a.{kind}{ending}", row, text) for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_text_and_markdown_are_a_document_a_file_and_lines_one_a_line(tmp_path, ending):
    body = "Line one.\n\nLine two.\n"
    for name in ("a.txt", "b.md"):
        (tmp_path / f"{name}{ending}").write_bytes(pack(b"\xef\xbb\xbf" + body.encode(), ending))
    assert texts_of(tmp_path, f"a.txt{ending}", f"b.md{ending}", text_field=None) == [body, body]
    assert texts_of(tmp_path, f"a.txt{ending}", format="lines", text_field=None) == ["Line one.", "Line two."]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_warc_gives_the_text_of_html_pages_that_were_found(tmp_path, ending):
    places = ["valley", "harbour", "old town"]
    lines = [f"Weavers of the {place} sell cloth at the market on the first day of every month." for place in places]
    text = "\n".join(lines)
    paragraphs = "".join(f"<p>{line}</p>" for line in lines)
    page = f"<html><body><nav>Menu</nav><article>{paragraphs}</article><footer>Cookies</footer></body></html>"
    pages = [
        ("200 OK", "text/html", page),
        ("404 Not Found", "text/html", page),
        ("200 OK", "image/png", "x"),
        ("200 OK", "text/html; charset=utf-8", "<html><body></body></html>"),
    ]
    (tmp_path / f"a.warc{ending}").write_bytes(pack(warc(pages), ending))
    assert texts_of(tmp_path, f"a.warc{ending}", text_field=None) == [text, ""]


def test_all_members_of_a_compressed_file_are_read(tmp_path):
    for ending in (".gz", ".zst"):
        data = pack(json_lines(TEXTS[:1]), ending) + pack(json_lines(TEXTS[1:]), ending)
        (tmp_path / f"a.jsonl{ending}").write_bytes(data)
        assert texts_of(tmp_path, f"a.jsonl{ending}") == TEXTS


def test_a_glob_gives_files_by_name_and_each_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(json_lines([name]))
    assert texts_of(tmp_path, "b.jsonl", "*.jsonl", "**/*.jsonl") == ["b.jsonl", "a.jsonl", "deep/c.jsonl"]


def test_a_url_is_read_as_the_file_is(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "b.parquet").write_bytes(parquet(TEXTS))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            if self.path != "/cut.jsonl":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(json_lines(TEXTS))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert texts_of(tmp_path, f"{address}/a.jsonl.gz", f"{address}/b.parquet") == TEXTS + TEXTS
        for name in ("none.jsonl", "cut.jsonl"):
            with pytest.raises(ValueError, match=re.escape(f"{address}/{name} can't be fetched: check the address")):
                rows_of(tmp_path, f"{address}/{name}")
        server.shutdown()


def test_malformed_json_lines_are_kept_with_their_row_and_the_rest_is_read(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b"",
        b'["no", "object"]',
        b'{"other": 1}',
        b'{"text": " "}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "good too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = rows_of(tmp_path, "a.jsonl")
    assert [item.row for item in items] == list(range(9))
    assert [item.row for item in items if isinstance(item, Document)] == [0, 8]
    errors = [item.error for item in items if isinstance(item, Malformed)]
    expected = [
        "invalid JSON",
        "a JSON list",
        "no field `text`",
        "`text` is empty",
        "`text` is int",
        "invalid JSON",
        "lone surrog",
    ]
    assert all(part in error for part, error in zip(expected, errors, strict=True)), errors
    assert items[1].raw == "{broken"
    assert items[6].raw == '{"text": "\\xff"}'


def test_malformed_csv_rows_are_kept_with_their_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'n,text\n1,good\n2\n3,"no"quote\n4,\xff\n5,\n\n6,"two\nlines"\n')
    items = rows_of(tmp_path, "a.csv")
    assert [(item.row, type(item)) for item in items] == [
        (0, Document), (1, Malformed), (2, Malformed), (3, Malformed), (4, Malformed), (5, Document),
    ]  # fmt: skip
    assert [item.raw for item in items[1:5]] == ["2", '3,"no"quote', "4,\\xff", "5,"]
    assert "1 columns, the header has 2" in items[1].error
    assert "invalid CSV" in items[2].error
    assert items[5].text == "two\nlines"


def test_a_null_in_parquet_and_an_undecodable_text_file_are_malformed(tmp_path):
    pd.DataFrame({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"\n\n")
    items = rows_of(tmp_path, "a.parquet", "b.txt", "c.txt")
    assert [type(item) for item in items] == [Document, Malformed, Malformed, Malformed]
    assert [item.error[:12] for item in items[1:]] == ["`text` is No", "invalid UTF-", "the file hol"]
    assert items[2].raw == "caf\\xe9"


def test_partitions_are_bounded_and_lose_nothing(tmp_path):
    texts = [str(number) * 1000 for number in range(10, 60)]
    for name, part in (("a", texts[:20]), ("b", texts[20:])):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(part))
    files = find_files(tmp_path, {"own": source("*.jsonl")}, "clean")
    found = [frame for frame, _ in partitions(files, 10_000)]
    assert max(sum(map(len, frame["text"])) for frame in found) < 10_000 + 2_000
    assert len(found) > 8
    joined = pd.concat(found)
    assert joined["text"].tolist() == texts
    assert joined["file"].tolist() == ["a.jsonl"] * 20 + ["b.jsonl"] * 30
    assert joined["row"].tolist() == [*range(20), *range(30)]


def test_reading_goes_no_further_than_what_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(2000):
            stream.write(json_lines(["x" * 10_000]))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])  # cut off: reading to the end would raise
    file = find_files(tmp_path, {"own": source("a.jsonl.gz")}, "clean")
    frame, _ = next(partitions(file, 100_000))
    assert len(frame) == 10


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("a.jsonl", b"", {}, "a.jsonl is empty: fill it, or take it out of `clean.sources.own.files`"),
        ("a.jsonl", b"\x00\x01\x02binary", {}, "a.jsonl is a binary file, not UTF-8 text: correct the format"),
        ("a.txt", gzip.compress(b"x" * 99, mtime=0), {}, "a.txt is a binary file"),
        ("a.jsonl", json_lines(["x"], "body"), {}, "has no column `text`; it has: body, other. Set `text_field`"),
        ("a.csv", b"id,body\n1,x\n", {}, "has no column `text`; it has: id, body. Set `text_field`"),
        ("a.parquet", parquet(TEXTS), {"text_field": "m"}, "has no column `m`; it has: text, n. Set `text_field`"),
        ("a.parquet", b"no parquet at all", {}, "a.parquet is not a readable Parquet file"),
        ("a.warc", b"no warc at all\r\n\r\n", {}, "a.warc is not a readable WARC file"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS * 99), mtime=0)[:-9],
            {},
            "Truncated compressed stream): it may be damaged",
        ),
        ("a.jsonl.zst", pack(json_lines(TEXTS), ".zst")[:-3], {}, "Truncated compressed stream): it may be damaged"),
        ("a.docx", b"x", {}, "the format of a.docx can't be inferred from its name (known: .jsonl"),
        ("a.jsonl", json_lines(TEXTS), {"text_field": None}, "`clean.sources.own.text_field` is null, but"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path, name, data, options, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        rows_of(tmp_path, name, **options)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.jsonl", "`clean.sources.own.files`: no file matches none-*.jsonl below"),
        ("../a.jsonl", "../a.jsonl leaves"),
        ("/etc/passwd", "/etc/passwd leaves"),
    ],
)
def test_a_pattern_that_leads_nowhere_or_outside_is_refused(tmp_path, pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_files(tmp_path, {"own": source(pattern)}, "clean")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`clean.root`: {tmp_path / 'none'} is not a directory")):
        find_files(tmp_path / "none", {"own": source("*")}, "clean")


def test_a_file_that_vanishes_is_named(tmp_path):
    gone = File("own", 0, "a.jsonl", str(tmp_path / "a.jsonl"), "jsonl", "text", 1)
    with pytest.raises(ValueError, match=re.escape("a.jsonl is missing: bring it, or take it out of source `own`")):
        list(read(gone))


def test_a_disk_too_full_for_a_temporary_copy_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet(TEXTS)))
    with pytest.raises(OSError, match="No space left on device") as caught:
        rows_of(tmp_path, "a.parquet.gz")
    assert caught.value.errno == errno.ENOSPC


def test_files_are_numbered_in_the_order_of_sources(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(json_lines(TEXTS))
    files = find_files(tmp_path, {"z": source("b.jsonl"), "y": source("a.jsonl")}, "clean")
    assert [(file.number, file.source, Path(file.name).name) for file in files] == [
        (0, "z", "b.jsonl"),
        (1, "y", "a.jsonl"),
    ]
