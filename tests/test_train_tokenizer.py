import csv
import random

import pandas
import pytest

from model.text.tokenizer import Tokenizer
from tasks.running.params import Machine
from tasks.running.stage import Stage
from tasks.train_tokenizer import Params, draw_sample, lines, measure, run, train

WORDS = ["the", "llama", "walks", "over", "a", "high", "mountain", "and", "then", "the", "clear", "river", "rests"]


def documents(seed, source, number):
    rng = random.Random(f"{seed} {source}")
    return [
        {
            "id": f"{rng.getrandbits(64):016x}",
            "source": source,
            "text": "\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(4)),
        }
        for _ in range(number)
    ]


def write(directory, *parts):
    directory.mkdir(parents=True)
    for number, rows in enumerate(parts):
        pandas.DataFrame(rows, columns=["id", "source", "text"]).to_parquet(directory / f"part-{number:05d}.parquet")
    return directory


def make_params(**changes):
    values = {"vocab_size": 330, "character_coverage": 0.99995, "max_bytes_per_source": 5000, "max_line_bytes": 4192}
    return Params(**(values | changes))


def make_stage(root, params, threads=1):
    machine = Machine(threads=threads, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    (root / "output").mkdir(parents=True)
    return Stage("train_tokenizer", params, 1, machine, root / "output", root / "scratch", root / "record")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = documents(0, "stories", 40) + documents(0, "web", 3)
    write(tmp_path / "data" / "clean" / "documents", rows[:20], rows[20:])


def test_the_stage_writes_the_same_bytes_whatever_the_threads(corpus, tmp_path):
    figures = [run(make_stage(tmp_path / name, make_params(), threads)) for name, threads in (("a", 1), ("b", 4))]
    assert figures[0] == figures[1]
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / "output" / name).read_bytes() == (tmp_path / "b" / "output" / name).read_bytes()
    model = (tmp_path / "a" / "output" / "tokenizer.model").read_bytes()
    assert str(tmp_path).encode() not in model


def test_the_tokenizer_is_of_llamas_kind(corpus, tmp_path):
    figures = run(make_stage(tmp_path / "a", make_params()))
    tokenizer = Tokenizer(tmp_path / "a" / "output" / "tokenizer.model")
    assert figures["vocab_size"] == tokenizer.vocab_size == 330
    assert [tokenizer.piece(token) for token in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.encode("\n", bos=False, eos=False)[-1] == 3 + 10
    assert "▁the" in {tokenizer.piece(token) for token in range(330)}


def test_the_tables_list_the_longest_and_most_frequent_tokens(corpus, tmp_path):
    stage = make_stage(tmp_path / "a", make_params())
    run(stage)
    with (stage.tables / "most_frequent_tokens.csv").open(encoding="utf-8") as file:
        frequent = list(csv.DictReader(file))
    with (stage.tables / "longest_tokens.csv").open(encoding="utf-8") as file:
        longest = list(csv.DictReader(file))
    counts = [int(row["count"]) for row in frequent]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0
    assert max(len(row["piece"]) for row in longest) == len(longest[0]["piece"]) == int(longest[0]["characters"])
    assert not any(row["piece"].startswith("<") for row in frequent + longest)


def test_figures_of_a_tokenizer_are_counted_by_hand(corpus, tmp_path):
    run(make_stage(tmp_path / "a", make_params()))
    tokenizer = Tokenizer(tmp_path / "a" / "output" / "tokenizer.model")
    # `▁the` `▁the` and a line end for 8 characters; `▁` and two bytes for 1 character
    figures, counts = measure(tokenizer, {"stories": ["the the\n"], "web": ["é"]})
    assert figures == {
        "characters_per_token/stories": 8 / 3,
        "characters_per_token/web": 1 / 3,
        "characters_per_token": 9 / 6,
        "byte_token_share": 2 / 6,
        "unknown_token_share": 0,
        "unused_token_share": 1 - 5 / 330,
    }
    assert counts.total() == 6


def test_the_sample_depends_on_the_documents_alone_and_not_on_their_files(tmp_path):
    rows = documents(0, "stories", 60) + documents(0, "web", 60)
    mixed = rows.copy()
    random.Random(1).shuffle(mixed)
    one = draw_sample(write(tmp_path / "one", rows), 2000, seed=1)
    other = draw_sample(write(tmp_path / "other", mixed[:7], mixed[7:90], mixed[90:]), 2000, seed=1)
    assert one == other
    assert list(one) == ["stories", "web"]
    assert one != draw_sample(tmp_path / "one", 2000, seed=2)


def test_the_sample_fills_its_bytes_and_cuts_no_character(tmp_path):
    rows = [{"id": f"{number:016x}", "source": "web", "text": "é" * 100} for number in range(50)]
    sample = draw_sample(write(tmp_path / "documents", rows), 1001, seed=1)
    assert [len(text) for text in sample["web"]] == [100, 100, 100, 100, 100]
    sample = draw_sample(tmp_path / "documents", 1051, seed=1)
    assert [len(text) for text in sample["web"]] == [100, 100, 100, 100, 100, 25]
    whole = draw_sample(tmp_path / "documents", 1_000_000, seed=1)
    assert len(whole["web"]) == 50


def test_long_lines_are_cut_at_spaces_and_nothing_is_lost():
    text = "one two three\n\nfour " + "é" * 9
    cut = list(lines({"web": [text]}, max_bytes=10))
    assert cut == ["one two", " three", "four", " " + "é" * 4, "é" * 5]
    assert "".join(cut) == text.replace("\n", "")


def test_too_large_a_vocabulary_names_the_largest_possible(tmp_path):
    sample = {"web": ["hello world"]}
    with pytest.raises(
        ValueError, match=r"`train_tokenizer.vocab_size` is 2048, but the text offers only 287 tokens"
    ) as error:
        train(sample, make_params(vocab_size=2048))
    assert "set it to at most 287" in str(error.value)
    train(sample, make_params(vocab_size=287))


def test_too_small_a_vocabulary_names_the_smallest_possible():
    sample = {"web": ["hello world"]}  # 8 characters with the space, 256 bytes, 3 special tokens
    with pytest.raises(ValueError, match=r"`train_tokenizer.vocab_size` is 100, .* set it to at least 267, or lower"):
        train(sample, make_params(vocab_size=100))
    train(sample, make_params(vocab_size=267))


def test_text_without_a_line_is_named():
    with pytest.raises(ValueError, match="SentencePiece can't learn from data/clean/documents"):
        train({"web": ["\n\n"]}, make_params())


def test_a_corpus_without_documents_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "clean" / "documents", [])
    with pytest.raises(ValueError, match="data/clean/documents holds no documents: see data/clean/rejected"):
        run(make_stage(tmp_path / "a", make_params()))
