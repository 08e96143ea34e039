from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from ruamel.yaml import YAML
from stages import Workspace, stage_here

from model.network.checkpoint import load_weights, open_checkpoint, read_config, save_model
from model.network.packing import Example, documents_of
from model.network.transformer import Llama, ModelConfig
from model.text.dialogue import encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, Step, build_model, draw_weights
from tasks.learning import answers
from tasks.learning.answers import Data, Folder, Pool, Training, course_figures, drawn_in, mean_context, plan_steps
from tasks.learning.loop import Progress, Taken, digest_of, read_base
from tasks.running.names import metric_name
from tasks.running.stage import Stage
from tasks.sft import Params, run

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow", "rose": "red"}
EVALUATE = {"root": "evaluation", "prompts": ["asked.jsonl"], "truth": None}
WATCHED: dict[str, Any] = {
    "num_ranks": None,
    "init_from": "base", "root": "dialogues", "max_malformed_share": 0.05, "context": 64, "epochs": 6,
    "early_share": 0.5, "log_every": 5, "validate_every": 10, "samples_per_category": 1, "max_new_tokens": 12,
    "save_every": 4, "max_shard_bytes": 10**9,
    "sources": {
        "own": {
            "files": ["train.jsonl"], "format": "auto", "max_dialogues": None, "validation_share": 0, "weight": 1,
            "loss": "all",
        },
        "held_out": {
            "files": ["validation.jsonl"], "format": "auto", "max_dialogues": None, "validation_share": 1, "weight": 0,
            "loss": "all",
        },
    },
}  # fmt: skip


def params_of(**changes: Any) -> dict[str, Any]:
    return {**TRAINED, "batch_rows": 4, "micro_batch_rows": 2, **WATCHED, **changes}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def write_dialogues(directory: Path, num_dialogues: int = 60, longer: int = 0) -> None:
    """Questions on colours, in two categories; `longer` dialogues of many turns are among them."""
    directory.mkdir(parents=True)
    names = sorted(COLOURS)
    lines = []
    for number in range(num_dialogues):
        name = names[number % len(names)]
        asked = turns(f"{number}: the {name}?", COLOURS[name])
        if number % 5 == 0:
            asked += turns("and the sky?", "blue")
        category = "chat" if len(asked) > 2 else "factual"
        lines.append({"id": f"d{number}", "messages": asked, "category": category, "safety": False, "source": "own"})
    lines += [{"id": f"long{n}", "messages": turns(*["the sky?", "blue"] * 9)} for n in range(longer)]
    held_out = [{"id": f"v{n}", "messages": turns(f"so, the {n}?", COLOURS[n]), "category": "factual"} for n in names]
    several = turns("the sun?", "yellow", "and the rose?", "red")
    held_out.append({"id": "vchat", "messages": several, "category": "chat"})
    for file, rows in (("train", lines), ("validation", held_out)):
        (directory / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(root: Path) -> None:
    """An evaluation that asks about nothing that the dialogues do, and the params.yaml that names it."""
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"evaluate": EVALUATE}, file)
    (root / "evaluation").mkdir()
    (root / "evaluation/asked.jsonl").write_text('{"prompt": "Who paints the sea?"}\n')


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing, with a tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    join_alone()
    texts = ["the sky is blue, and so on 12", "[INST] and the rose? [/INST] red"]
    tokenizer = Tokenizer(train_tokenizer(directory, texts, 300))
    config = {**SMALL, "max_position_embeddings": 64, "vocab_size": tokenizer.vocab_size}
    model = build_model(Llama, ModelConfig.model_validate(config), EngineParams.model_validate(TRAINED))
    draw_weights(model, seed=1)
    save_model(model, tokenizer, directory / "base", {}, 10**9)
    return directory / "base"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:
    """A working directory with a base model and dialogues."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    write_dialogues(Path("dialogues"))
    write_evaluation(Path())
    join_alone()
    return tmp_path


def stage_of(fresh: bool = True, **changes: Any) -> Stage[Params]:
    return stage_here("sft", Params.model_validate(params_of(**changes)), fresh)


def metrics_of(name: str) -> list[tuple[int, int, float]]:
    lines = [json.loads(line) for line in Path("record/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["metrics"][name]) for line in lines if name in line["metrics"]]


def test_a_model_that_answers_comes_out(place: Path) -> None:
    figures = run(stage_of(epochs=30, log_every=1, samples_per_category=6))
    assert figures["dialogues"] == 60
    assert figures["dialogues_too_long"] == figures["dialogues_refused"] == 0
    for name in ("all", "chat", "factual"):
        start = metrics_of(f"validation/{name}/loss")[0]
        assert start[:2] == (0, 0)
        assert figures[f"validation/{name}/loss"] < start[2] - 2
    steps = int(figures["steps"])
    assert [step for step, *_ in metrics_of("train/loss")] == list(range(1, steps + 1))
    assert metrics_of("train/loss")[-1][1] == figures["tokens"]
    for name in ("tokens_per_second", "answer_tokens_per_second", "mfu"):
        assert all(value > 0 for *_, value in metrics_of(f"train/{name}"))
    told = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [(row["category"], row["prompt"]) for row in told] == [
        ("chat", "user: the sun?\nassistant: yellow\nuser: and the rose?"),
        *(("factual", f"so, the {name}?") for name in sorted(COLOURS)),
    ]
    right = [
        row["answer"] == colour for row, colour in zip(told, ["red", *map(COLOURS.get, sorted(COLOURS))], strict=True)
    ]
    assert sum(right) >= 6 and all(row["finished"] for row in told)
    table = pandas.read_csv("record/tables/samples.csv")
    assert sorted(set(table["step"])) == sorted({*range(0, steps, 10), steps * 29 // 30, steps})
    assert len(table) == 7 * len(set(table["step"]))
    with Path("out/plots/validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tokens", "category", "loss"]
    assert [row["category"] for row in rows[-3:]] == ["all", "chat", "factual"]
    assert float(rows[-3]["loss"]) == figures["validation/all/loss"]
    training = json.loads(Path("out/training.json").read_text())
    assert (training["step"], training["tokens"]) == (steps, figures["tokens"])
    assert training["base_sha256"] == digest_of(Path("base"))
    course = {step: loss for step, _, loss in metrics_of("validation/all/loss")}
    assert figures["validation/all/best_loss"] == min(course.values()) == course[figures["validation/all/best_step"]]
    gain = course[steps * 29 // 30] - course[steps]  # the last of thirty epochs
    assert figures["validation/all/improvement_of_last_epoch"] == gain
    early = json.loads(Path("out/early/training.json").read_text())
    assert early["step"] == (steps + 1) // 2
    assert early["tokens"] == next(tokens for step, tokens, _ in metrics_of("train/loss") if step == early["step"])
    assert early["base_sha256"] == training["base_sha256"]
    assert digest_of(Path("base")) != digest_of(Path("out/early")) != digest_of(Path("out"))


def test_the_early_checkpoint_is_what_training_was_at_its_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = int(run(stage_of(precision="bf16", zero_stage=1))["steps"])
    shutil.move("out/early", "early")
    real = answers.take_step

    def stops_in_the_middle(training: Training) -> Taken:
        if training.progress.step == (steps + 1) // 2:
            save_model(training.engine.module, training.tokenizer, Path("then"), {}, 10**9)
            raise KeyboardInterrupt
        return real(training)

    monkeypatch.setattr(answers, "take_step", stops_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of(precision="bf16", zero_stage=1))
    assert digest_of(Path("then")) == digest_of(Path("early"))
    model, _ = open_checkpoint(Path("early"), "fp32", torch.device("cpu"))
    assert isinstance(model, Llama)


def data_of(lengths: list[int], **pools: tuple[int, float]) -> Data:
    """Dialogues of these lengths, divided among pools of so many and such a weight."""
    examples = [Example(np.zeros(length, np.int32), np.ones(length, np.bool_)) for length in lengths]
    ends = np.cumsum([count for count, _ in pools.values()]).tolist()
    assert ends[-1] == len(lengths)
    numbers = [range(end - count, end) for end, (count, _) in zip(ends, pools.values(), strict=True)]
    named = {name: Pool(own, weight) for own, (name, (_, weight)) in zip(numbers, pools.items(), strict=True)}
    return Data(examples, [], named, {}, [], [], [], 0)


LENGTHS = np.random.default_rng(1).integers(5, 60, 50).tolist()


def test_each_dialogue_is_used_once_an_epoch_in_an_order_of_its_own(place: Path) -> None:
    params = Params.model_validate(params_of(epochs=3))
    data = data_of(LENGTHS, own=(50, 0.3))
    steps = plan_steps(data, params, 1, None)
    assert all(len(rows) == 4 for rows in steps[:-1]) and 1 <= len(steps[-1]) <= 4
    assert all(sum(LENGTHS[number] for number in row) <= 64 for rows in steps for row in rows)
    order = drawn_in(steps)
    epochs = [order[first : first + 50] for first in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert plan_steps(data, params, 1, None) == steps != plan_steps(data, params, 2, None)


def test_a_part_of_a_pass_is_a_part_of_each_sources_dialogues(place: Path) -> None:
    data = data_of(LENGTHS, few=(10, 1.0), many=(40, 4.0))
    for epochs, expected in ((0.5, 25), (2.5, 125), (0.001, 1)):
        drawn = drawn_in(plan_steps(data, Params.model_validate(params_of(epochs=epochs)), 1, None))
        assert len(drawn) == expected
        assert len(drawn[:25]) == len(set(drawn[:25]))  # none again before all of its source
    times = Counter(drawn_in(plan_steps(data, Params.model_validate(params_of(epochs=2.5)), 1, None)))
    assert {times[number] for number in range(50)} <= {2, 3}
    half = drawn_in(plan_steps(data, Params.model_validate(params_of(epochs=0.5)), 1, None))
    assert 0 < sum(number < 10 for number in half) < 10


def test_sources_share_the_dialogues_by_weight_and_use_all_of_theirs_before_any_again(place: Path) -> None:
    params = Params.model_validate(params_of(epochs=3))
    data = data_of(LENGTHS, few=(10, 3.0), many=(40, 2.0))
    times = Counter(drawn_in(plan_steps(data, params, 1, None)))
    # 3 x 50 dialogues; three fifths of them, 90, from the 10 of one, and 60 from the 40 of the other
    assert [times[number] for number in range(10)] == [9] * 10
    assert Counter(times[number] for number in range(10, 50)) == {1: 20, 2: 20}
    passes = [next_pass for next_pass, _ in zip(answers.draw_passes(data.pools, 1), range(3), strict=False)]
    assert [sum(number < 10 for number in drawn) for drawn in passes] == [30, 30, 30]
    assert sorted(passes[0][30:] + passes[1][30:50]) == list(range(10, 50))
    # thirds don't add up to whole dialogues; every pass has its share to within one, and all together to within a half
    thirds = answers.draw_passes(data_of(LENGTHS, few=(10, 1.0), many=(40, 2.0)).pools, 1)
    counts = [sum(number < 10 for number in drawn) for drawn, _ in zip(thirds, range(3), strict=False)]
    assert counts == [17, 16, 17]


def test_the_order_of_a_source_does_not_depend_on_the_others() -> None:
    def order(**pools: tuple[int, float]) -> list[int]:
        drawn = itertools.islice(answers.draw_passes(data_of([9] * 60, **pools).pools, 1), 3)
        return [number for each in drawn for number in each if number < 20]

    alone, beside = order(own=(20, 1.0), other=(40, 1.0)), order(own=(20, 1.0), another=(40, 3.0))
    assert len(beside) < len(alone) and alone[: len(beside)] == beside


def test_a_given_number_of_steps_is_reached_by_passing_again(place: Path) -> None:
    params = Params.model_validate(params_of(epochs=1))
    data = data_of(LENGTHS, own=(50, 1.0))
    whole = plan_steps(data, params, 1, None)
    longer, shorter = plan_steps(data, params, 1, 3 * len(whole)), plan_steps(data, params, 1, 2)
    assert len(longer) == 3 * len(whole) and all(len(rows) == 4 for rows in longer)
    assert shorter == whole[:2] == longer[:2]
    order = drawn_in(longer)
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))


def test_the_validation_loss_tells_whether_training_ended_too_early_or_too_late() -> None:
    rows = [{"step": step, "all": loss} for step, loss in ((0, 5.0), (10, 3.0), (15, 2.5), (20, 2.75))]
    assert course_figures(rows, 15) == {
        "validation/all/best_loss": 2.5, "validation/all/best_step": 15,
        "validation/all/improvement_of_last_epoch": -0.25,
    }  # fmt: skip
    assert course_figures(rows[:-1], 0)["validation/all/improvement_of_last_epoch"] == 2.5


def test_attention_costs_what_the_dialogue_of_a_token_is_long() -> None:
    examples = [Example(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in (10, 30)]
    assert mean_context(examples) == 25  # a quarter of the tokens in 10, the others in 30


def read(stage: Stage[Params], tokenizer: Tokenizer) -> Data:
    folders = [Folder(Path(stage.params.root), stage.params.sources)]
    return answers.read_data(folders, stage.params, tokenizer, stage.seed, "sft")


def test_the_losses_are_means_over_the_answers_tokens(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    stage = stage_of(epochs=2, log_every=1, learning_rate=1e-12)  # so small that the model stays what it was
    figures = run(stage)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained("base"), Tokenizer(Path("base/tokenizer.model"))

    def losses_of(messages: list[Any]) -> list[float]:
        ids, is_learnt = encode_dialogue(messages, tokenizer)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        return losses[torch.tensor(is_learnt[1:])].tolist()

    found: dict[str, list[float]] = {"all": []}
    for line in Path("dialogues/validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("all", row["category"]):
            found.setdefault(name, []).extend(losses_of(row["messages"]))
    assert len(found["chat"]) != len(found["factual"])
    for name, losses in found.items():
        assert figures[f"validation/{name}/loss"] == pytest.approx(np.mean(losses), abs=1e-4)

    dialogues = [json.loads(line)["messages"] for line in Path("dialogues/train.jsonl").read_text().splitlines()]
    steps = plan_steps(read(stage, tokenizer), stage.params, stage.seed, None)
    logged = metrics_of("train/loss")
    assert len(logged) == len(steps)
    num_answer_tokens = 0
    for rows, (_, _, loss) in zip(steps, logged, strict=True):
        losses = [loss for row in rows for number in row for loss in losses_of(dialogues[number])]
        num_answer_tokens += len(losses)
        assert loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert figures["answer_tokens"] == num_answer_tokens


def test_only_the_last_answer_of_a_dialogue_is_learnt_where_its_source_says_so(place: Path) -> None:
    tokenizer = Tokenizer(Path("base/tokenizer.model"))
    last = {"own": {**WATCHED["sources"]["own"], "loss": "last"}, "held_out": WATCHED["sources"]["held_out"]}
    everything, only = (read(stage_of(sources=sources), tokenizer) for sources in (WATCHED["sources"], last))
    for whole, part in zip(everything.train, only.train, strict=True):
        assert whole.ids.tolist() == part.ids.tolist()
        num_answers = Counter(whole.ids.tolist())[tokenizer.eos_id]
        assert part.num_targets == whole.num_targets if num_answers == 1 else 0 < part.num_targets < whole.num_targets
    assert {Counter(example.ids.tolist())[tokenizer.eos_id] for example in only.train} == {1, 2}
    figures = run(stage_of(epochs=2, sources=last))
    assert figures["answer_tokens"] == 2 * sum(example.num_targets for example in only.train)


def test_what_each_source_gave_is_told(place: Path) -> None:
    lines = Path("dialogues/train.jsonl").read_text().splitlines(keepends=True)
    Path("dialogues/train.jsonl").write_text("".join(lines[:40]))
    Path("dialogues/more.jsonl").write_text("".join(lines[40:]))
    own = WATCHED["sources"]["own"]
    sources = {**WATCHED["sources"], "more": {**own, "files": ["more.jsonl"], "weight": 3, "loss": "last"}}
    stage = stage_of(epochs=2, sources=sources)
    figures = run(stage)
    assert (figures["own/dialogues"], figures["more/dialogues"]) == (30, 90)  # a quarter and three of 2 x 60
    assert (figures["own/epochs"], figures["more/epochs"]) == (30 / 40, 90 / 20)
    assert figures["own/answer_tokens"] + figures["more/answer_tokens"] == figures["answer_tokens"]
    share = figures["more/answer_tokens"] / figures["answer_tokens"]
    assert figures["more/answer_token_share"] == share == pytest.approx(1 - figures["own/answer_token_share"])
    assert not any(name.startswith("held_out/") for name in figures)
    off = {**sources, "more": {**sources["more"], "weight": 0}}
    figures = run(stage_of(epochs=2, sources=off))
    assert (figures["dialogues"], figures["own/dialogues"]) == (40, 80)
    assert not any(name.startswith("more/") for name in figures)


def test_what_was_left_out_is_counted_and_listed(place: Path) -> None:
    shutil.rmtree("dialogues")
    write_dialogues(Path("dialogues"), longer=3)
    with Path("dialogues/train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "assistant", "content": "blue"}]}\nno JSON\n')
    figures = run(stage_of(epochs=2))
    assert (figures["dialogues"], figures["dialogues_too_long"], figures["dialogues_refused"]) == (60, 3, 2)
    too_long = [json.loads(line) for line in Path("out/too_long.jsonl").read_text().splitlines()]
    assert [row["id"] for row in too_long] == ["long0", "long1", "long2"]
    assert all(row["source"] == "own" and row["num_tokens"] > 64 for row in too_long)
    refused = [json.loads(line) for line in Path("out/refused.jsonl").read_text().splitlines()]
    assert [(row["source"], row["file"], row["row"]) for row in refused] == [
        ("own", "train.jsonl", number) for number in (63, 64)
    ]
    assert "turn 1 is the assistant's" in refused[0]["error"]
    assert refused[1]["raw"] == "no JSON"


def test_what_the_evaluation_asks_is_not_learnt(place: Path) -> None:
    Path("evaluation/asked.jsonl").write_text('{"prompt": "3: The sky."}\n{"prompt": "And the Sky?"}\n')
    figures = run(stage_of(epochs=1))
    refused = [json.loads(line) for line in Path("out/refused.jsonl").read_text().splitlines()]
    asked = {3, *range(0, 60, 5)}  # alone, and as the last of two turns
    assert {row["id"] for row in refused} == {f"d{number}" for number in asked}
    assert {row["error"] for row in refused} == {"the evaluation asks the same"}
    assert (figures["dialogues"], figures["dialogues_in_evaluation"], figures["dialogues_refused"]) == (47, 13, 13)
    Path("evaluation/asked.jsonl").unlink()
    with pytest.raises(ValueError, match=r"evaluation/asked.jsonl is missing: correct `evaluate.prompts`"):
        run(stage_of(epochs=1))


def test_categories_have_whatever_names(place: Path) -> None:
    categories = ["all", "tokens", "Coding & debugging", "Coding _ debugging"]
    rows = [{"messages": turns(f"so, the {name}?", "blue"), "category": name} for name in categories]
    Path("dialogues/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = run(stage_of(epochs=1))
    losses = [figures[metric_name("validation", name, "loss")] for name in categories]
    assert len([name for name in figures if re.fullmatch("validation/.*/loss", name)]) == 5
    assert min(losses) < figures["validation/all/loss"] < max(losses)
    assert len(set(pandas.read_csv("out/plots/validation.csv")["category"])) == 5
    assert metrics_of("validation/all/loss")[-1][1] == figures["tokens"]


def test_a_stopped_run_resumes_to_the_same_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(stage_of(early_share=0.1))  # taken before the state that a resumed run goes on from
    undisturbed = {path.relative_to("out"): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    real, calls = answers.train_step, []

    def stopped_at_11(*arguments: Any) -> Step:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answers, "train_step", stopped_at_11)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of(early_share=0.1))
    assert sorted(Path("scratch/resume").iterdir())[-1].name == "step-8"
    figures = run(stage_of(fresh=False, early_share=0.1))
    assert json.loads(Path("out/early/training.json").read_text())["step"] < 8
    assert len(calls) == 10 + 1 + figures["steps"] - 8
    assert {p.relative_to("out"): p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == undisturbed
    samples = pandas.read_csv("record/tables/samples.csv")
    validated = sorted({0, 10, 20, 30, 40, 50, figures["steps"] * 5 // 6, figures["steps"]})
    assert samples["step"].tolist() == [step for step in validated for _ in range(2)]


def test_a_last_step_of_few_rows_learns_from_each_once(place: Path) -> None:
    stage = stage_of()
    config, tokenizer = read_base(Path("base"), 64, "sft")
    data = read(stage, tokenizer)
    model = Llama(config, "off")
    load_weights(model, Path("base"))
    engine = type("Engine", (), {"device": torch.device("cpu")})()
    training = Training(stage, Path("base"), engine, tokenizer, data, [], Progress({}))
    first, second = answers.micro_batches(training, [[0], [1, 2], [3]])
    assert first.num_targets == sum(data.train[number].num_targets for number in (0, 1, 2))
    assert second.num_targets == data.train[3].num_targets
    first, second = answers.micro_batches(training, [[0], [1, 2]])
    assert (first.num_targets > 0, second.num_targets) == (True, 0)
    assert not model(second.ids, second.documents, second.targets).any()


def test_training_that_failed_stops_with_step_and_dialogues(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = answers.train_step, []

    def fails_at_third(engine: Any, batches: Any, loss_of: Any, count: int, accepts: Any) -> Step:
        calls.append(count)
        return real(engine, batches, loss_of, 0 if len(calls) == 3 else count, accepts)

    monkeypatch.setattr(answers, "train_step", fails_at_third)
    with pytest.raises(ValueError, match=r"step 3: loss (inf|nan).*Lower `sft\.learning_rate`, or look at") as caught:
        run(stage_of())
    assert Counter(str(caught.value).split("learnt from: ")[1].split(", ")).most_common(1)[0][1] == 1
    assert "own d" in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(place: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    with pytest.raises(ValueError, match=r"has 300 tokens, and base/config.json describes a model of 320"):
        run(stage_of())


def test_a_row_longer_than_the_models_context_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`sft.context` is 65 tokens, and base was trained with 64"):
        run(stage_of(context=65))


def test_nothing_to_train_or_validate_on_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"no dialogue is left to train on: of 67 in `sft.sources` 60 are to train on"):
        run(stage_of(context=5))
    sources = {"own": WATCHED["sources"]["own"]}
    with pytest.raises(ValueError, match=r"no dialogue is left to validate on: of 60 in `sft.sources` 0 are"):
        run(stage_of(sources=sources))
    (Path("dialogues/long.jsonl")).write_text(json.dumps({"messages": turns(*["the sky?", "blue"] * 9)}) + "\n")
    more = {"long": {**sources["own"], "files": ["long.jsonl"], "weight": 0.5}}
    with pytest.raises(
        ValueError,
        match=r"source `long` has weight 0.5, but no dialogue to learn from: all are .*`sft.context`, or",
    ):
        run(stage_of(sources={**WATCHED["sources"], **more}))


# --- whole runs in processes of their own ---

DVC_STAGE = f"""\
stages:
  sft:
    cmd: exec {sys.executable} -m tasks.workers.launch sft
    deps:
    - base
    - dialogues
    - evaluation
    params:
    - seed
    - evaluate
    - sft
    outs:
    - data/sft
"""


def workspace_of(root: Path, base: Path, num_ranks: int = 1, **changes: Any) -> Workspace:
    shutil.copytree(base, root / "base")
    write_dialogues(root / "dialogues")
    write_evaluation(root)
    return Workspace(root, "sft", DVC_STAGE, num_ranks, sft=params_of(**changes), evaluate=EVALUATE)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, base: Path) -> None:
    settings = {"precision": "bf16", "zero_stage": 1, "epochs": 12}
    undisturbed = workspace_of(tmp_path / "undisturbed", base, **settings)
    undisturbed.finish()
    disturbed = workspace_of(tmp_path / "disturbed", base, **settings)
    disturbed.kill_at(4, signal.SIGKILL)
    disturbed.kill_at(16, signal.SIGTERM)
    assert not (disturbed.output).exists()
    disturbed.finish()
    assert disturbed.files == undisturbed.files
    assert {"model.safetensors", "metrics.json", "plots/train.csv", "samples.jsonl"} <= undisturbed.files.keys()


@pytest.mark.slow
def test_two_ranks_reach_the_loss_of_one(tmp_path: Path, base: Path) -> None:
    one = workspace_of(tmp_path / "one", base, micro_batch_rows=1, zero_stage=1).finish()
    for zero_stage in (0, 3):
        two = workspace_of(tmp_path / f"two{zero_stage}", base, num_ranks=2, micro_batch_rows=1, zero_stage=zero_stage)
        figures = two.finish()
        for name in ("train/loss", "validation/all/loss", "validation/chat/loss"):
            assert figures[name] == pytest.approx(one[name], abs=1e-3)
        assert figures["answer_tokens"] == one["answer_tokens"]
        model = Llama(read_config(two.output), "off")
        prompt = encode_prompt(turns("the sky?"), Tokenizer(two.output / "tokenizer.model"))  # type: ignore[arg-type]
        assert model(torch.tensor(prompt), documents_of([len(prompt)], torch.device("cpu"))).shape == (len(prompt), 300)
