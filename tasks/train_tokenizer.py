"""Train the tokenizer: SentencePiece byte-pair encoding, as in Llama 2 (LLaMA section 2.1, Llama 2 section 2.2.1).

Numbers are split into digits, characters outside the vocabulary become bytes, and the text is not normalised.
It learns from a seeded sample of every source, so that memory stays bounded however large the corpus is.

Reads data/clean/documents/part-*.parquet.
Writes tokenizer.model, with tokenizer.json and tokenizer_config.json for transformers.
"""

from __future__ import annotations

import heapq
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from model.progress.bar import progress_bar
from model.text.tokenizer import Tokenizer
from tasks.running.digests import number_of
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.stage import Stage, start

DOCUMENTS = DATA / "clean" / "documents"
ROWS_AT_ONCE = 256  # documents held in memory while reading; doesn't affect the result


class Params(Section):
    """The tokenizer and the text it learns from."""

    vocab_size: int = Field(gt=0, description="tokens in the vocabulary, the 256 bytes and 3 special tokens included")
    character_coverage: float = Field(
        gt=0, le=1, description="share of the sample's characters that get a token; the rest is spelt as bytes"
    )
    max_bytes_per_source: int = Field(ge=1_000, description="text to learn from, in UTF-8 bytes per source")
    max_line_bytes: int = Field(ge=64, description="UTF-8 bytes; longer lines are cut at a space before learning")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Draw the sample, train, save, and measure the tokenizer on what it was trained on."""
    sample = draw_sample(DOCUMENTS, stage.params.max_bytes_per_source, stage.seed)
    if not sample:
        raise ValueError(f"{DOCUMENTS} holds no documents: see data/clean/rejected for the rules that rejected them")
    model = train(sample, stage.params)
    path = stage.output / "tokenizer.model"
    path.write_bytes(model)
    tokenizer = Tokenizer(path)
    tokenizer.save(stage.output)
    figures, counts = measure(tokenizer, sample)
    _write_tables(stage.tables, tokenizer, counts)
    return {
        "vocab_size": tokenizer.vocab_size,
        "sample_documents": sum(len(texts) for texts in sample.values()),
        "sample_characters": sum(len(text) for texts in sample.values() for text in texts),
        **figures,
    }


def draw_sample(documents: Path, max_bytes: int, seed: int) -> dict[str, list[str]]:
    """Return random texts by source, at most `max_bytes` of UTF-8 per source (the last text is cut to fit).

    Seed and id give every document a random number; a source's smallest numbers are drawn until they fill the bytes.
    So one pass is enough, only the sample is in memory, and neither the order of the documents nor how they are spread
    over files matters.
    """
    import pyarrow.parquet

    drawn: dict[str, list[tuple[int, bytes]]] = {}  # by source, a heap: the largest number on top (hence negative)
    sizes: Counter[str] = Counter()
    parts = sorted(documents.glob("part-*.parquet"))
    with progress_bar(len(parts), "sampling text", "part") as bar:
        for part in parts:
            with pyarrow.parquet.ParquetFile(part) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=["id", "source", "text"]):
                    for row in batch.to_pylist():
                        source, text = row["source"], row["text"].encode()
                        number = number_of(f"{seed} {row['id']}")
                        heap = drawn.setdefault(source, [])
                        heapq.heappush(heap, (-number, text))
                        sizes[source] += len(text)
                        while sizes[source] - len(heap[0][1]) >= max_bytes:
                            sizes[source] -= len(heapq.heappop(heap)[1])
            bar.update()
    sample = {}
    for source in sorted(drawn):
        texts = [text for _, text in sorted(drawn[source], reverse=True)]
        surplus = max(0, sizes[source] - max_bytes)
        texts[-1] = texts[-1][: len(texts[-1]) - surplus]
        whole = [text.decode(errors="ignore") for text in texts]  # a character cut in two is dropped
        sample[source] = [text for text in whole if text]
    return sample


def lines(sample: dict[str, list[str]], max_bytes: int) -> Iterator[str]:
    """Yield the sample's lines, none longer than `max_bytes` of UTF-8: SentencePiece silently drops longer ones.

    Line ends are not part of a line, so a line end becomes the byte token `<0x0A>`, as in Llama.
    """
    for texts in sample.values():
        for text in texts:
            for line in text.split("\n"):
                rest = line.encode()
                while len(rest) > max_bytes:
                    cut = rest.rfind(b" ", 1, max_bytes)
                    head = rest[: cut if cut > 0 else max_bytes]
                    head = head.decode(errors="ignore").encode()  # not in the middle of a character
                    yield head.decode()
                    rest = rest[len(head) :]
                if rest:
                    yield rest.decode()


def train(sample: dict[str, list[str]], params: Params) -> bytes:
    """Return the trained tokenizer.model.

    Raises ValueError, naming the parameter and the nearest possible size, when the vocabulary doesn't fit the text: too
    large for the pairs it offers, or too small for its characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(sample, params.max_line_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=params.vocab_size,
            character_coverage=params.character_coverage,
            max_sentence_length=params.max_line_bytes,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            input_sentence_size=0,  # all lines: the sample is drawn above
            num_threads=1,  # the model file records it, and more threads don't speed up byte pairs
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), params)) from None
    return model.getvalue()


def _explain(message: str, params: Params) -> str:
    """Say what SentencePiece's error means for params.yaml."""
    name, size = "params.yaml: `train_tokenizer.vocab_size`", params.vocab_size
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"{name} is {size}, but the text offers only {found[1]} tokens: set it to at most {found[1]}, or add text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{name} is {size}, but special tokens, bytes and single characters alone need {found[1]}: set it to at "
            f"least {found[1]}, or lower `train_tokenizer.character_coverage`"
        )
    return f"SentencePiece can't learn from {DOCUMENTS}: {message}"


def measure(tokenizer: Tokenizer, sample: dict[str, list[str]]) -> tuple[dict[str, float], Counter[int]]:
    """Return figures about the tokenizer on a sample, and how often each token occurs in it.

    Characters per token, overall and by source; shares of the tokens that are single bytes (line ends, which are
    always one, left out) and that are unknown; share of the vocabulary that the sample doesn't use.
    """
    figures: dict[str, float] = {}
    counts: Counter[int] = Counter()
    total_characters = 0
    for source, texts in sample.items():
        characters, before = sum(len(text) for text in texts), counts.total()
        for text in texts:
            counts.update(tokenizer.encode(text, bos=False, eos=False))
        figures[metric_name("characters_per_token", source)] = characters / (counts.total() - before)
        total_characters += characters
    total = counts.total()
    line_ends = counts[tokenizer.encode("\n", bos=False, eos=False)[-1]]
    figures["characters_per_token"] = total_characters / total
    figures["byte_token_share"] = (sum(counts[t] for t in counts if tokenizer.is_byte(t)) - line_ends) / total
    figures["unknown_token_share"] = counts[tokenizer.unk_id] / total
    figures["unused_token_share"] = 1 - len(counts) / tokenizer.vocab_size
    return figures, counts


def _write_tables(directory: Path, tokenizer: Tokenizer, counts: Counter[int]) -> None:
    """Write the most frequent and the longest tokens, for MLflow."""
    import pandas

    num_rows = 100
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    table = pandas.DataFrame(
        {
            "token": range(tokenizer.vocab_size),
            "piece": pieces,
            "characters": [len(piece) for piece in pieces],
            "count": [counts[token] for token in range(tokenizer.vocab_size)],
        }
    )
    specials = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id}
    table = table[[token not in specials and not tokenizer.is_byte(token) for token in table["token"]]]
    frequent = table.sort_values(["count", "token"], ascending=[False, True])
    frequent.head(num_rows).to_csv(directory / "most_frequent_tokens.csv", index=False)
    longest = table.sort_values(["characters", "count", "token"], ascending=[False, False, True])
    longest.head(num_rows).to_csv(directory / "longest_tokens.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
