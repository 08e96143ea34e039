from __future__ import annotations

import csv
import itertools
import json
import math
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from stages import Workspace, stage_here

from model.network.checkpoint import read_config
from model.network.packing import documents_of
from model.network.transformer import Llama
from model.training.engine import Step
from tasks.learning.stream import Text, read_stream
from tasks.pretrain import __main__ as pretrain
from tasks.pretrain.__main__ import Params, is_spike, run
from tasks.running.stage import Stage

WATCHED: dict[str, Any] = {
    "num_ranks": None,
    "init_from": "data/seeds/none", "log_every": 5, "validate_every": 10, "max_validation_tokens": 100000,
    "save_every": 4, "spike_window": 5,
    "spike_loss_ratio": 1.5, "spike_gradient_ratio": 8.0, "skip_spikes": False, "max_skipped": 10,
    "max_shard_bytes": 10**9,
}  # fmt: skip
SENTENCES = ["the llama walks over the hill", "a hill, a llama, 12 steps", "where does the llama walk? over the hill"]
SOURCES = ("stories", "lists")


def params_of(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **TRAINED, **WATCHED, **changes}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), SENTENCES, 300)


def write_stream(directory: Path, num_tokens: int, seed: int = 1, spoilt: range = range(0)) -> None:
    """Documents in which each token decides the next; those whose number is in `spoilt` are random instead."""
    rng = np.random.default_rng(seed)

    def documents(num_tokens: int, prefix: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        parts, rows, length = [], [], 0
        while length < num_tokens:
            number = len(rows)
            body = np.cumsum(np.full(rng.integers(3, 60), rng.integers(1, 3)))
            if number in spoilt and not prefix:
                body = rng.integers(0, 200, size=60)
            parts.append(np.concatenate(([1], 260 + body % 40 if number not in spoilt else 60 + body, [2])))
            rows.append({"start": length, "source": SOURCES[number % 2], "id": f"{prefix}{number:04x}"})
            length += len(parts[-1])
        return np.concatenate(parts).astype(np.uint16), rows

    directory.mkdir(parents=True)
    tokens, rows = documents(num_tokens, "")
    for number, shard in enumerate(np.array_split(tokens, 3)):
        np.save(directory / f"train-{number:05d}.npy", shard)
    pandas.DataFrame(rows).to_parquet(directory / "documents.parquet")
    held_out = []
    for source in SOURCES:
        tokens, rows = documents(700, "v")
        np.save(directory / f"validation-{source}.npy", tokens)
        held_out += [{**row, "source": source} for row in rows]
    pandas.DataFrame(held_out).to_parquet(directory / "validation.parquet")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path) -> Path:
    """An empty working directory with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    Path("data/train_tokenizer").mkdir(parents=True)
    shutil.copy(tokenizer_file, "data/train_tokenizer/tokenizer.model")
    join_alone()
    return tmp_path


def stage_of(**changes: Any) -> Stage[Params]:
    return stage_here("pretrain", Params.model_validate(params_of(**changes)))


def metrics_of(name: str) -> list[tuple[int, int, float]]:
    lines = [json.loads(line) for line in Path("record/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["metrics"][name]) for line in lines if name in line["metrics"]]


def test_a_base_model_comes_out_that_has_learnt(place: Path) -> None:
    write_stream(Path("data/tokenize"), 8 * 32 * 40 + 20)
    figures = run(stage_of())
    assert figures["steps"] == 40
    assert figures["tokens"] == 40 * 8 * 32
    assert figures["spikes"] == 0
    start = metrics_of("validation/stories/loss")[0]
    assert start[:2] == (0, 0)
    assert start[2] == pytest.approx(math.log(300), abs=0.2)  # knows nothing yet
    for source in (*SOURCES, "all"):
        assert figures[f"validation/{source}/loss"] < start[2] - 1.5
        assert figures[f"validation/{source}/perplexity"] == pytest.approx(
            math.exp(figures[f"validation/{source}/loss"])
        )
    assert [step for step, *_ in metrics_of("train/loss")] == list(range(5, 41, 5))
    assert [step for step, *_ in metrics_of("validation/all/loss")] == [0, 10, 20, 30, 40]
    rates = {step: value for step, _, value in metrics_of("train/learning_rate")}
    assert rates[5] > rates[20] > rates[40] == pytest.approx(1e-3)
    assert all(value > 0 for name in ("tokens_per_second", "mfu") for *_, value in metrics_of(f"train/{name}"))
    with Path("out/plots/validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tokens", "source", "loss"]
    assert [row["source"] for row in rows[-3:]] == ["all", "lists", "stories"]
    assert float(rows[-3]["loss"]) == figures["validation/all/loss"]
    assert json.loads(Path("out/training.json").read_text()) == {"step": 40, "tokens": 10240}
    assert Path("record/artifacts/loss.png").stat().st_size > 1000


def test_the_validation_loss_is_the_mean_over_a_sources_tokens(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_stream(Path("data/tokenize"), 8 * 32 * 8)
    figures = run(stage_of())
    theirs = AutoModelForCausalLM.from_pretrained("out")
    losses = []
    _, validation = read_stream(Path("data/tokenize"))
    for text in validation.values():
        tokens = text.tokens.read(0, len(text.tokens)).astype(np.int64)
        cuts = sorted({*text.starts.tolist(), *range(0, len(tokens), 32), len(tokens)})
        for begin, end in itertools.pairwise(cuts):
            inside = end if end in text.starts or end == len(tokens) else end + 1
            with torch.no_grad():
                logits = theirs(torch.from_numpy(tokens[begin:end])[None]).logits[0]
            targets = torch.from_numpy(tokens[begin + 1 : inside])
            losses += torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none").tolist()
    assert figures["validation/all/loss"] == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_a_batch_of_bad_text_is_noted_with_its_documents_and_skipped(place: Path, skip_spikes: bool) -> None:
    spoilt = range(170, 184)
    write_stream(Path("data/tokenize"), 8 * 32 * 40, spoilt=spoilt)
    figures = run(stage_of(skip_spikes=skip_spikes))
    assert figures["spikes"] >= 1
    spikes = pandas.read_csv("record/tables/spikes.csv", dtype={"id": str})
    assert {f"{number:04x}" for number in spoilt} & set(spikes["id"])
    assert (spikes["loss"] > 1.5 * spikes["median_loss"]).any()
    assert set(spikes["updated"]) == {not skip_spikes}
    assert set(spikes["source"]) == set(SOURCES)


def test_only_a_full_window_tells_spikes() -> None:
    params = Params.model_validate(params_of())
    notes = {"losses": [2.0, 2.0, 2.0, 9.0], "gradient_norms": [1.0, 1.0, 1.0, 1.0]}
    assert not is_spike(params, notes, 100.0, 100.0)
    notes = {"losses": [2.0, 2.0, 2.0, 9.0, 2.0], "gradient_norms": [1.0, 1.0, 1.0, 1.0, 1.0]}
    assert not is_spike(params, notes, 2.9, 7.9)
    assert is_spike(params, notes, 3.1, 1.0)
    assert is_spike(params, notes, 2.0, 8.1)


def test_what_stays_above_the_steps_before_is_learnt_after_so_many_updates_left_out(place: Path) -> None:
    spoilt = range(150, 10**6)  # from here on, for good
    write_stream(Path("data/tokenize"), 8 * 32 * 40, spoilt=spoilt)
    run(stage_of(skip_spikes=True, max_skipped=3, log_every=1))
    losses = {step: loss for step, _, loss in metrics_of("train/loss")}
    spikes = pandas.read_csv("record/tables/spikes.csv").groupby("step")["updated"].first()
    first = int(spikes.index[0])
    # three are left out, then each is taken, until more than half of the window of five has the new level
    assert spikes.to_dict() == {first + n: n >= 3 for n in range(6)}
    assert len(losses) == 40
    assert losses[40] < losses[first] - 0.5


def test_training_that_failed_stops_with_step_and_documents(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stream(Path("data/tokenize"), 8 * 32 * 12)
    real = pretrain.train_step
    calls = []

    def fails_at_third(engine: Any, batches: Any, loss_of: Any, count: int, accepts: Any) -> Step:
        calls.append(count)
        return real(engine, batches, loss_of, 0 if len(calls) == 3 else count, accepts)

    monkeypatch.setattr(pretrain, "train_step", fails_at_third)
    text, _ = read_stream(Path("data/tokenize"))
    expected = text.documents_in(2 * 8 * 32, 3 * 8 * 32)
    with pytest.raises(
        ValueError, match=r"step 3: loss (inf|nan).*Lower `pretrain\.learning_rate`, or look at"
    ) as caught:
        run(stage_of())
    named = str(caught.value).split("learnt from: ")[1].split(", ")
    assert named == [f"{document['source']} {document['id']}" for document in expected]
    assert len(named) > 3


def test_documents_are_found_by_their_tokens(place: Path) -> None:
    import pyarrow as pa

    table = pa.table({"start": [0, 10, 25], "source": ["a", "b", "a"], "id": ["x", "y", "z"]})
    text = Text(None, np.array([0, 10, 25]), table)  # type: ignore[arg-type]
    assert [row["id"] for row in text.documents_in(0, 10)] == ["x"]
    assert [row["id"] for row in text.documents_in(9, 11)] == ["x", "y"]
    assert [row["id"] for row in text.documents_in(24, 40)] == ["y", "z"]


def test_a_model_can_go_on_from_another(place: Path) -> None:
    write_stream(Path("data/tokenize"), 8 * 32 * 20)
    first = run(stage_of())
    shutil.move("out", "base")
    second = run(stage_of(init_from="base", warmup_steps=2))
    before = metrics_of("validation/all/loss")[0][2]
    assert before == pytest.approx(first["validation/all/loss"], abs=1e-5)
    assert second["validation/all/loss"] < before
    with pytest.raises(
        ValueError, match=r"`pretrain.init_from` names base, whose hidden_size is 32, and this run's is 64"
    ):
        run(stage_of(init_from="base", hidden_size=64))


def test_a_model_of_llama_3s_kind_goes_on_as_one(place: Path) -> None:
    write_stream(Path("data/tokenize"), 8 * 32 * 20)
    run(stage_of())
    shutil.move("out", "base")
    config = json.loads(Path("base/config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_scaling"] = {**rope, "original_max_position_embeddings": 16}
    Path("base/config.json").write_text(json.dumps(config))
    run(stage_of(init_from="base", warmup_steps=2))
    assert json.loads(Path("out/config.json").read_text())["rope_scaling"] == config["rope_scaling"]


def test_too_little_text_is_refused(place: Path) -> None:
    write_stream(Path("data/tokenize"), 200)
    with pytest.raises(
        ValueError, match=r"data/tokenize holds 2\d\d tokens, less than one step of `pretrain.batch_rows` 8"
    ):
        run(stage_of())
    with pytest.raises(ValueError, match=r"a warm-up of 4 \(`warmup_steps`, `warmup_ratio`\) leaves none of 1 steps"):
        run(stage_of(batch_rows=4))


def test_a_missing_or_damaged_stream_is_named(place: Path) -> None:
    with pytest.raises(ValueError, match=r"data/tokenize holds no train-\*\.npy: run `dvc repro tokenize`"):
        read_stream(Path("data/tokenize"))
    write_stream(Path("data/tokenize"), 500)
    shard = Path("data/tokenize/train-00001.npy")
    content = shard.read_bytes()
    shard.write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"train-00001\.npy cannot be read"):
        read_stream(Path("data/tokenize"))
    shard.write_bytes(content)
    Path("data/tokenize/documents.parquet").write_bytes(b"not a table")
    with pytest.raises(ValueError, match=r"documents\.parquet cannot be read"):
        read_stream(Path("data/tokenize"))


# --- whole runs in processes of their own ---

DVC_STAGE = f"""\
stages:
  pretrain:
    cmd: exec {sys.executable} -m tasks.workers.launch pretrain
    deps:
    - data/tokenize
    - data/train_tokenizer/tokenizer.model
    params:
    - seed
    - pretrain
    outs:
    - data/pretrain
"""


def workspace_of(root: Path, tokenizer_file: Path, num_steps: int, num_ranks: int = 1, **changes: Any) -> Workspace:
    (root / "data/train_tokenizer").mkdir(parents=True)
    shutil.copy(tokenizer_file, root / "data/train_tokenizer/tokenizer.model")
    write_stream(root / "data/tokenize", 8 * 32 * num_steps + 1)
    return Workspace(root, "pretrain", DVC_STAGE, num_ranks, pretrain=params_of(**changes))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, tokenizer_file: Path) -> None:
    settings = {"precision": "bf16", "zero_stage": 1}
    undisturbed = workspace_of(tmp_path / "undisturbed", tokenizer_file, num_steps=30, **settings)
    undisturbed.finish()
    disturbed = workspace_of(tmp_path / "disturbed", tokenizer_file, num_steps=30, **settings)
    disturbed.kill_at(4, signal.SIGKILL)
    disturbed.kill_at(16, signal.SIGTERM)
    assert not (disturbed.output).exists()
    disturbed.finish()
    assert disturbed.files == undisturbed.files
    assert {"model.safetensors", "config.json", "metrics.json", "plots/train.csv"} <= undisturbed.files.keys()
    assert [path.name for path in sorted(disturbed.root.glob(".scratch/pretrain/*/*"))] == ["finished", "resume"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path: Path, tokenizer_file: Path) -> None:
    settings = {"precision": "bf16", "zero_stage": 1, "save_every": 2}
    undisturbed = workspace_of(tmp_path / "undisturbed", tokenizer_file, num_steps=60, **settings)
    undisturbed.finish()
    whole = undisturbed.files
    shutil.rmtree(undisturbed.output)
    shutil.rmtree(undisturbed.root / ".scratch" / "pretrain")  # else it would only end again
    started = time.monotonic()
    undisturbed.finish()
    seconds = time.monotonic() - started
    assert undisturbed.files == whole
    disturbed = workspace_of(tmp_path / "disturbed", tokenizer_file, num_steps=60, **settings)
    disturbed.kill_at_random(20, seconds, random.Random(1), whole)
    disturbed.finish()
    assert disturbed.files == whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_reach_the_loss_of_one(precision: str, tmp_path: Path, tokenizer_file: Path) -> None:
    one = workspace_of(tmp_path / "one", tokenizer_file, 30, precision=precision, zero_stage=1).finish()
    for zero_stage in (0, 2, 3):
        workspace = workspace_of(
            tmp_path / f"two{zero_stage}", tokenizer_file, 30, num_ranks=2, precision=precision, zero_stage=zero_stage
        )
        two = workspace.finish()
        for name in ("train/loss", "validation/all/loss", "validation/stories/loss"):
            assert two[name] == pytest.approx(one[name], abs=1e-3)
        model = Llama(read_config(workspace.output), "off")
        assert model(torch.arange(9), documents_of([9], torch.device("cpu"))).shape == (9, 300)


def test_bad_parameters_end_the_stage_with_one_line(tmp_path: Path, tokenizer_file: Path) -> None:
    workspace = workspace_of(tmp_path / "workspace", tokenizer_file, num_steps=8, micro_batch_rows=3)
    process = workspace.start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "pretrain: params.yaml: `batch_rows` 8 is not a multiple of `micro_batch_rows` 3 x 1 ranks = 3" in errors
    assert "Traceback" not in errors


def test_no_more_held_out_text_is_used_than_asked(place: Path) -> None:
    write_stream(Path("data/tokenize"), 8 * 32 * 8)
    whole = run(stage_of())
    shutil.rmtree("out")
    capped = run(stage_of(max_validation_tokens=1))
    assert capped["train/loss"] == whole["train/loss"]
    assert capped["validation/all/loss"] != whole["validation/all/loss"]
