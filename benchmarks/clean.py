"""Compare the throughput of stage `clean` with datatrove 0.10: same documents, same rules, same number of processes.

Run from the project's root, with ../shared/datasets beside it::

    pip install 'datatrove>=0.10,<0.11' spacy 'xxhash<4' orjson fasteners tldextract regex nltk
    python -m benchmarks.clean

Both read the same gzipped JSON lines (English text of the profile `real`) and write what they keep. Both repair Unicode
with ftfy, identify languages with py3langid (datatrove's own model would have to be downloaded, so it gets ours), apply
the rules of C4 and Gopher with the same limits, find near-duplicates by MinHash with the same bands, and mask personal
data; ours also looks for phone and card numbers and removes exact duplicates. Times are those of whole runs, including
the start of processes, in turns; the table shows each tool's best.

datatrove keeps fewer documents: it splits words with spaCy, for which a punctuation mark is a word without a letter, so
Gopher's rule on such words rejects a tenth of the documents. Ours splits words at whitespace, as Gopher does.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flows.values import override, read_profile
from tasks.clean.__main__ import run
from tasks.clean.language import identify
from tasks.clean.partition import Params
from tasks.reading.sources import Document, find_files, read
from tasks.running.params import Machine, parse_section, read_params
from tasks.running.stage import Stage

SOURCES = ("c4", "stackexchange", "peps", "commoncrawl")
RULES = "web"
NUM_FILES = 4
NUM_PROCESSES = 2
NUM_RUNS = 2


def main() -> None:
    """Print the table of both tools' times."""
    values = read_params()
    override(values, read_profile("real"), "profiles/real.yaml")
    params = parse_section(Params, values, "clean")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        num_documents, num_characters = write_documents(place / "documents", params)
        print(f"{num_documents:,} documents, {num_characters / 1e6:.1f} million characters, {NUM_PROCESSES} processes")
        tools: dict[str, Callable[[Path, Path, Params], int]] = {"clean": run_ours, "datatrove": run_datatrove}
        seconds: dict[str, list[float]] = {name: [] for name in tools}
        kept = {}
        for attempt in range(NUM_RUNS):
            for name, tool in tools.items():
                start = time.perf_counter()
                kept[name] = tool(place / "documents", place / f"{name}-{attempt}", params)
                seconds[name].append(time.perf_counter() - start)
    table = pd.DataFrame(
        {
            "seconds": {name: min(times) for name, times in seconds.items()},
            "million characters/s": {name: num_characters / 1e6 / min(times) for name, times in seconds.items()},
            "documents kept": kept,
        }
    )
    print(table.to_string(float_format="{:.2f}".format))
    print(f"clean / datatrove: {min(seconds['datatrove']) / min(seconds['clean']):.2f} times the throughput")


def write_documents(folder: Path, params: Params) -> tuple[int, int]:
    """Distribute the sources' documents over a few files; return the number of documents and of characters."""
    folder.mkdir()
    texts = [
        item.text
        for file in find_files(Path(params.root), {name: params.sources[name] for name in SOURCES}, "clean")
        if file.format != "warc"
        for item in read(file)
        if isinstance(item, Document)
    ]
    for number in range(NUM_FILES):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::NUM_FILES])
    return len(texts), sum(map(len, texts))


def run_ours(documents: Path, place: Path, params: Params) -> int:
    """Clean the documents with the stage itself; return how many are kept."""
    source = params.sources["c4"].model_copy(update={"files": ["*.jsonl.gz"], "rules": RULES})
    changed = params.model_copy(
        update={"root": str(documents), "sources": {"documents": source}, "partition_megabytes": 1}
    )
    machine = Machine(threads=1, workers=NUM_PROCESSES, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    stage = Stage("clean", changed, 1, machine, place / "output", place / "scratch", place / "record")
    return int(run(stage)["documents_kept"])


def run_datatrove(documents: Path, place: Path, params: Params) -> int:
    """Clean the documents with datatrove's own steps in their usual order; return how many are kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()
    rules, language, deduplication = params.rules[RULES], params.language, params.deduplication
    languages = rules.languages or []

    def is_wanted(document: Any) -> bool:
        found, score = identify(document.text, languages, language)
        return found in languages and score >= language.min_score

    def execute(name: str, pipeline: Sequence[Any], num_tasks: int) -> None:
        LocalPipelineExecutor(
            list(pipeline), tasks=num_tasks, workers=NUM_PROCESSES, logging_dir=str(place / "logs" / name)
        ).run()

    c4, gopher, repetition = rules.c4, rules.gopher, rules.repetition
    config = MinhashConfig(
        n_grams=deduplication.shingle_words,
        num_buckets=deduplication.num_bands,
        hashes_per_bucket=deduplication.rows_a_band,
    )
    filtered, signatures, buckets, removed, output = (
        str(place / name) for name in ("filtered", "signatures", "buckets", "removed", "output")
    )
    execute(
        "filter",
        [
            JsonlReader(str(documents)),
            FTFYFormatter(normalization="NFC", fix_line_breaks=True),
            LambdaFilter(is_wanted),
            C4QualityFilter(
                filter_no_terminal_punct=c4.terminal_punctuation,
                min_num_sentences=c4.min_sentences,
                min_words_per_line=c4.min_line_words or -1,
                max_word_length=-1,
                remove_citations=False,
                filter_curly_bracket=c4.curly_bracket,
            ),
            GopherQualityFilter(
                min_doc_words=gopher.min_words,
                max_doc_words=gopher.max_words,
                max_symbol_word_ratio=gopher.max_symbol_share,
                max_bullet_lines_ratio=gopher.max_bullet_line_share,
                max_ellipsis_lines_ratio=gopher.max_ellipsis_line_share,
                max_non_alpha_words_ratio=gopher.min_alphabetic_word_share,
                min_stop_words=gopher.min_stop_words,
            ),
            GopherRepetitionFilter(
                dup_line_frac=repetition.max_line_share,
                dup_para_frac=repetition.max_paragraph_share,
                dup_line_char_frac=repetition.max_line_character_share,
                dup_para_char_frac=repetition.max_paragraph_character_share,
                top_n_grams=tuple(enumerate(repetition.max_top_ngram_shares or [], start=2)),
                dup_n_grams=tuple(enumerate(repetition.max_repeated_ngram_shares or [], start=5)),
            ),
            JsonlWriter(filtered),
        ],
        NUM_FILES,
    )
    execute("sign", [JsonlReader(filtered), MinhashDedupSignature(signatures, config)], NUM_FILES)
    execute("pair", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets)
    execute("group", [MinhashDedupCluster(buckets, removed, config=config)], 1)
    execute(
        "write",
        [JsonlReader(filtered), MinhashDedupFilter(removed), PIIFormatter(), JsonlWriter(output)],
        NUM_FILES,
    )
    kept = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in Path(output).glob("*.jsonl.gz"))
    shutil.rmtree(place)
    return kept


if __name__ == "__main__":
    sys.exit(main())
