import json
import random
import shutil

import numpy as np
import pandas
import pytest
import sentencepiece

from model.text.tokenizer import Tokenizer
from tasks.running.params import Machine, parse_section
from tasks.running.stage import Stage
from tasks.tokenize.__main__ import Params, Source, check_sources, hold_out, plan_stream, run, write_validation
from tasks.tokenize.encoding import Index, open_tokens

WORDS = ["the", "llama", "walks", "over", "a", "high", "mountain", "and", "then", "it", "rests", "1999", "times", "é"]
SHARES = {"web": (67.0, 2.0, 0.1), "books": (4.5, 1.0, 0.2), "wiki": (20.0, 3.0, 0.1), "questions": (0.0, 0.0, 1.0)}
COUNTS = {"web": 120, "books": 30, "wiki": 60, "questions": 9}


def make_documents():
    rng = random.Random(0)
    rows = []
    for source, number in COUNTS.items():
        for _ in range(number):
            text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 40)))
            rows.append({"id": f"{rng.getrandbits(64):016x}", "source": source, "text": text})
    rng.shuffle(rows)
    return rows


DOCUMENTS = {row["id"]: row for row in make_documents()}


def write_corpus(root, *parts):
    directory = root / "data" / "clean" / "documents"
    directory.mkdir(parents=True)
    for number, rows in enumerate(parts):
        table = pandas.DataFrame(rows, columns=["id", "source", "text"])
        table.to_parquet(directory / f"part-{number:05d}.parquet")
    trained = root / "data" / "train_tokenizer"
    trained.mkdir(parents=True)
    with (trained / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([row["text"] for row in DOCUMENTS.values()]),
            model_writer=model,
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )


def make_params(mixture=None, **changes):
    shares = SHARES if mixture is None else mixture
    named = {
        name: {"weight": weight, "max_epochs": epochs, "validation_share": share}
        for name, (weight, epochs, share) in shares.items()
    }
    values = {"num_tokens": 8000, "min_filled_share": 0.95, "max_piece_tokens": 50, "shard_tokens": 3000}
    return Params.model_validate(values | {"mixture": named} | changes)


def make_stage(root, params, workers=1):
    machine = Machine(threads=1, workers=workers, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    (root / "output").mkdir(parents=True)
    (root / "record").mkdir()
    return Stage("tokenize", params, 1, machine, root / "output", root / "scratch", root / "record")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The stage run on the corpus in one file."""
    root = tmp_path_factory.mktemp("tokenize")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_corpus(root, list(DOCUMENTS.values()))
        stage = make_stage(root / "run", make_params())
        figures = run(stage)
        yield stage, figures, Tokenizer(root / "data" / "train_tokenizer" / "tokenizer.model")


def read_stream(output):
    shards = [np.load(path) for path in sorted(output.glob("train-*.npy"))]
    return shards, np.concatenate(shards), pandas.read_parquet(output / "documents.parquet")


def test_the_stream_is_each_document_between_bos_and_eos_cut_into_pieces(finished):
    stage, figures, tokenizer = finished
    shards, stream, documents = read_stream(stage.output)
    assert stream.dtype == np.uint16
    assert [len(shard) for shard in shards[:-1]] == [3000] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= 3000
    assert len(stream) == figures["tokens"] <= 8000
    ends = [*documents["start"][1:], len(stream)]
    for row, end in zip(documents.itertuples(), ends, strict=True):
        assert row.source == DOCUMENTS[row.id]["source"]
        whole = tokenizer.encode(DOCUMENTS[row.id]["text"], bos=True, eos=True)
        assert stream[row.start : end].tolist() == whole[row.piece * 50 : row.piece * 50 + 50]
    assert set(documents["piece"]) >= {0, 1, 2}


def test_an_epoch_has_every_piece_of_every_document_once(finished):
    stage, _, tokenizer = finished
    _, _, documents = read_stream(stage.output)
    held_out = set(pandas.read_parquet(stage.output / "validation.parquet")["id"])
    pieces = {
        (row["id"], piece)
        for row in DOCUMENTS.values()
        if row["source"] == "web" and row["id"] not in held_out
        for piece in range(-(-len(tokenizer.encode(row["text"], bos=True, eos=True)) // 50))
    }
    web = documents[documents["source"] == "web"]
    drawn = list(zip(web["id"], web["piece"], strict=True))
    assert len(drawn) > len(pieces)
    assert set(drawn[: len(pieces)]) == pieces


def test_validation_files_hold_the_held_out_documents(finished):
    stage, _, tokenizer = finished
    table = pandas.read_parquet(stage.output / "validation.parquet")
    for source, documents in table.groupby("source", observed=True):
        tokens = np.load(stage.output / f"validation-{source}.npy")
        ends = [*documents["start"][1:], len(tokens)]
        for row, end in zip(documents.itertuples(), ends, strict=True):
            assert tokens[row.start : end].tolist() == tokenizer.encode(DOCUMENTS[row.id]["text"], bos=True, eos=True)
    assert (table["source"] == "questions").sum() == COUNTS["questions"]


def test_no_held_out_document_is_in_the_stream_and_none_is_lost(finished):
    stage, _, _ = finished
    _, _, documents = read_stream(stage.output)
    held_out = pandas.read_parquet(stage.output / "validation.parquet")
    assert not set(documents["id"]) & set(held_out["id"])
    assert "questions" not in set(documents["source"])
    mixture = json.loads((stage.output / "mixture.json").read_text())["sources"]
    for source, number in COUNTS.items():
        assert mixture[source]["source_documents"] + mixture[source]["validation_documents"] == number


def test_shares_and_epochs_are_as_asked_where_there_is_text_enough(finished):
    stage, figures, _ = finished
    _, stream, documents = read_stream(stage.output)
    lengths = np.diff(np.append(documents["start"], len(stream)))
    given = {source: int(lengths[documents["source"] == source].sum()) for source in ("web", "books", "wiki")}
    mixture = json.loads((stage.output / "mixture.json").read_text())
    assert mixture["tokens"] == sum(given.values()) == len(stream)
    for source, tokens in given.items():
        row = mixture["sources"][source]
        assert row["tokens"] == tokens == figures[f"tokens/{source}"]
        assert row["share_asked"] == SHARES[source][0] / 91.5
        assert row["epochs"] == tokens / row["source_tokens"] <= SHARES[source][1]
        # none reaches its max_epochs here, so shares are as asked to within a document's length
        assert row["epochs"] < SHARES[source][1]
        assert row["share_reached"] == pytest.approx(row["share_asked"], abs=lengths.max() / len(stream))
    assert mixture["sources"]["questions"]["tokens"] == 0


def test_every_window_of_the_stream_has_the_mixture(finished):
    stage, _, _ = finished
    _, stream, documents = read_stream(stage.output)
    starts = np.append(documents["start"], len(stream))
    longest = np.diff(starts).max()
    sources = np.repeat(documents["source"].to_numpy(), np.diff(starts))
    for window in (1500, 4000):
        for begin in range(0, len(stream) - window, 250):
            part = sources[begin : begin + window]
            for source in ("web", "books", "wiki"):
                asked = SHARES[source][0] / 91.5
                assert abs((part == source).sum() - asked * window) <= 3 * longest


def test_the_result_is_the_same_bytes_for_any_number_of_files_and_workers(finished, tmp_path, monkeypatch):
    stage, figures, _ = finished
    rows = list(DOCUMENTS.values())[::-1]
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, rows[:50], [], rows[50:120], rows[120:])
    other = make_stage(tmp_path / "run", make_params(), workers=2)
    assert run(other) == figures
    names = sorted(path.relative_to(stage.output) for path in stage.output.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other.output) for path in other.output.rglob("*") if path.is_file())
    for name in names:
        assert (stage.output / name).read_bytes() == (other.output / name).read_bytes(), name


def test_a_stage_that_was_killed_keeps_what_it_encoded_and_the_shards_that_it_wrote(finished, tmp_path):
    stage, figures, _ = finished  # its directory is the working directory
    again = make_stage(tmp_path / "run", make_params())
    kept = [again.scratch / "encoded" / "part-00000", again.scratch / "shards" / "00001"]
    for directory in kept:
        shutil.copytree(stage.scratch / directory.relative_to(again.scratch), directory)
    files = [file for directory in kept for file in directory.iterdir()]
    assert len(files) == 3
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    assert run(again) == figures
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == before
    shards = sorted(path.name for path in stage.output.glob("train-*.npy"))
    assert len(shards) == 3
    for name in shards:
        assert (again.output / name).read_bytes() == (stage.output / name).read_bytes()


def test_tables_and_pictures_show_the_mixture(finished):
    stage, _, _ = finished
    table = pandas.read_csv(stage.output / "plots" / "mixture.csv")
    assert table["source"].tolist() == sorted(SHARES)
    assert table["share_reached"].sum() == pytest.approx(1)
    pandas.testing.assert_frame_equal(table, pandas.read_csv(stage.tables / "mixture.csv"))
    assert (stage.artifacts / "mixture.png").read_bytes().startswith(b"\x89PNG")
    speeds = [json.loads(line)["metrics"] for line in (stage.record / "metrics.jsonl").read_text().splitlines()]
    assert {name for metrics in speeds for name in metrics} == {"encoded_tokens_per_second", "stream_tokens_per_second"}


def make_index(lengths, ids=None):
    number = len(lengths)
    zeros = np.zeros(number, np.int32)
    starts = np.cumsum(lengths) - lengths
    return Index(np.array(range(number) if ids is None else ids, np.uint64), zeros, zeros, starts, np.array(lengths))


def test_documents_are_cut_into_pieces_that_cover_them():
    pieces = make_index([7, 3, 6], ids=[70, 30, 60]).cut(3)
    assert pieces.ids.tolist() == [70, 70, 70, 30, 60, 60]
    assert pieces.pieces.tolist() == [0, 1, 2, 0, 0, 1]
    assert pieces.starts.tolist() == [0, 3, 6, 7, 10, 13]
    assert pieces.lengths.tolist() == [3, 3, 1, 3, 3, 3]


def test_a_source_used_up_gives_its_share_to_the_others():
    params = make_params({"a": (1, 2, 0.1), "b": (1, 9, 0.1), "c": (2, 9, 0.1)}, num_tokens=3000)
    # a has 50 tokens for two epochs: 100 of its 750; the missing 650 go to b and c at 1 to 2
    plan = plan_stream(params, {name: make_index([size] * 5) for name, size in (("a", 10), ("b", 100), ("c", 100))}, 1)
    given = {name: plan.tokens_of(name) for name in "abc"}
    assert given["a"] == 100
    assert given["b"] == pytest.approx(2900 / 3, abs=100)
    assert given["c"] == pytest.approx(2900 * 2 / 3, abs=100)


def test_held_out_documents_stay_held_out_when_others_are_added():
    ids = np.random.default_rng(0).integers(0, 2**63, 4000, np.uint64)
    few, many, more = hold_out(ids[:2000], "web", 0.1), hold_out(ids, "web", 0.1), hold_out(ids, "web", 0.2)
    assert (few == many[:2000]).all()
    assert (many <= more).all()
    assert many.sum() == pytest.approx(400, abs=4 * np.sqrt(4000 * 0.1 * 0.9))


def test_a_share_of_none_or_all_is_exact():
    ids = np.arange(100, dtype=np.uint64)
    assert not hold_out(ids, "web", 0).any()
    assert hold_out(ids, "web", 1).all()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1e-9, "validation_share` is 1e-09, but none of the source's 3 documents is held out: raise it"),
        (1 - 1e-9, "validation_share` is 1, but none of the source's 3 documents is left to train on: lower it"),
    ],
)
def test_a_source_that_the_split_leaves_empty_is_named(share, message):
    with pytest.raises(ValueError, match=f"`tokenize.mixture.web.{message}"):
        hold_out(np.arange(3, dtype=np.uint64), "web", share)


def test_a_source_that_the_corpus_lacks_is_named_with_the_near_match():
    mixture = make_params().mixture
    with pytest.raises(ValueError, match=r"`tokenize.mixture.books` names a source without .*; did you mean `bookz`\?"):
        check_sources(mixture, {"web", "wiki", "questions", "bookz"})
    with pytest.raises(ValueError, match=r"`tokenize.mixture.books` .*; the corpus has questions, web, wiki"):
        check_sources(mixture, {"web", "wiki", "questions"})


def test_a_source_that_the_mixture_lacks_is_named():
    with pytest.raises(
        ValueError, match=r"`tokenize.mixture` doesn't name the source `peps` that data/clean/documents"
    ):
        check_sources(make_params().mixture, {*SHARES, "peps"})


def test_a_mixture_without_weight_is_refused():
    params = make_params({"questions": (0, 0, 1)})
    with pytest.raises(ValueError, match=r"`tokenize.mixture` gives every source weight 0"):
        check_sources(params.mixture, {"questions"})


@pytest.mark.parametrize("changes", [{"weight": 0}, {"max_epochs": 0}, {"validation_share": 1}])
def test_a_source_half_trained_on_is_refused(changes):
    values = {"weight": 1, "max_epochs": 1, "validation_share": 0.1} | changes
    with pytest.raises(ValueError, match=r"`web.*a source for validation only has weight 0, max_epochs 0 and"):
        parse_section(Source, {"web": values}, "web")


def test_too_few_tokens_for_one_document_names_the_source():
    params = make_params({"a": (1, 1, 0.1), "b": (99, 1, 0.1)}, num_tokens=1000)
    train = {"a": make_index([100, 100]), "b": make_index([10] * 200)}
    with pytest.raises(
        ValueError,
        match=r"`tokenize.num_tokens` is 1000, of which source `a` may give 10, too little for its next piece",
    ):
        plan_stream(params, train, 1)


def test_too_little_text_for_the_tokens_asked_is_said():
    params = make_params({"a": (1, 2, 0.1)}, num_tokens=1000)
    with pytest.raises(ValueError, match=r"the sources give 200 within their max_epochs: a share of 0.200, below"):
        plan_stream(params, {"a": make_index([10] * 10)}, 1)


def test_a_corpus_without_documents_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, [])
    with pytest.raises(ValueError, match="data/clean/documents holds no documents: see data/clean/rejected"):
        run(make_stage(tmp_path / "run", make_params()))


def test_a_document_that_occurs_twice_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(DOCUMENTS.values())
    write_corpus(tmp_path, rows, [rows[7], {**rows[7], "source": "books"}])
    message = rf"data/clean/documents holds document {rows[7]['id']} more than once \(2 surplus copies\)"
    with pytest.raises(ValueError, match=message):
        run(make_stage(tmp_path / "run", make_params()))


def test_no_validation_at_all_is_an_empty_table(tmp_path):
    write_validation(tmp_path, {"web": make_index([])}, [np.empty(0, np.uint16)])
    table = pandas.read_parquet(tmp_path / "validation.parquet")
    assert table.columns.tolist() == ["source", "start", "id", "piece"]
    assert len(table) == 0


def test_a_part_without_documents_has_no_tokens(tmp_path):
    (tmp_path / "tokens.bin").touch()
    assert len(open_tokens(tmp_path, np.dtype(np.uint16))) == 0
