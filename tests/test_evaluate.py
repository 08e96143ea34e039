from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from stages import Workspace, stage_here

from model.network.checkpoint import load_weights, open_checkpoint, save_model
from model.network.packing import documents_of
from model.network.transformer import Llama, ModelConfig
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, draw_weights
from tasks.evaluate import run
from tasks.judging import answering
from tasks.judging.agreement import gwet
from tasks.judging.answering import Answer, Judged, Params, Rating
from tasks.judging.intervals import wilson
from tasks.judging.outcomes import agreement_figures, figures_of, means_of, outcomes_of, parts_of, shares_of
from tasks.reading.prompts import Prompt
from tasks.running.names import metric_name
from tasks.running.places import NOTHING
from tasks.running.stage import Stage
from tasks.world.annotators import Tastes
from tasks.world.judge import Judgement, PromptTruth, Truth, safety_points

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
TRUTH = Truth({}, {}, {}, {}, ["sharp key"], ["spoon"], ["fool"], 9, {}, frozenset())
QUESTIONS = ["where does the llama walk?", "who walks over the hill?", "a hill or a llama?", "12 steps?", "over the"]


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """A small model of random weights with its tokenizer."""
    train_tokenizer(directory, [*QUESTIONS, "[INST] the llama walks over the hill [/INST]"])
    join_alone()
    values = {**SMALL, "vocab_size": 290, "max_position_embeddings": 96, "initializer_range": 0.3, **changes}
    model = build_model(Llama, ModelConfig.model_validate(values), EngineParams.model_validate(TRAINED))
    draw_weights(model, seed=1)
    save_model(model, Tokenizer(directory / "tokenizer.model"), directory / "sft", {"step": 1}, 10**9)
    return directory / "sft"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def asked(number: int, category: str = "factual", **values: Any) -> dict[str, Any]:
    text = QUESTIONS[number % len(QUESTIONS)]
    messages = [{"role": "user", "content": f"{text} {number}"}]
    return {"id": f"p{number}", "messages": messages, "category": category, "safety": False, "source": "test", **values}


def params_of(checkpoint: Path, **changes: Any) -> Params:
    sampling = {"temperature": 0, "top_p": 1, "top_k": 0, "max_new_tokens": 8}
    values = {
        "checkpoints": {"sft": str(checkpoint)}, "root": "prompts", "prompts": ["asked.jsonl"], "truth": None,
        "sampling": sampling, "max_rows": 4, "precision": "fp32", "gathered": str(NOTHING), "num_raters": 3,
        "text": str(NOTHING), "text_tokenizer": str(NOTHING), "max_text_tokens": 50, "tokens_at_once": 64,
    }  # fmt: skip
    return Params.model_validate({**values, **changes})


def stage_of(params: Params, name: str = "evaluate@sft") -> Stage[Params]:
    return stage_here(name, params)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    join_alone()
    return tmp_path


# --- what is answered ---


def greedy(model: Llama, tokenizer: Tokenizer, ids: list[int], num_tokens: int) -> list[int]:
    """What the likeliest next token gives, one whole forward pass a token."""
    answer: list[int] = []
    while len(answer) < num_tokens and tokenizer.eos_id not in answer:
        with torch.no_grad():
            logits = model(torch.tensor(ids + answer), documents_of([len(ids + answer)], CPU))
        answer.append(int(logits[-1].argmax()))
    return answer


def test_answers_are_the_models_greedy_ones(place: Path, checkpoint: Path) -> None:
    rows = [asked(number, ("factual", "writing")[number % 2]) for number in range(7)]
    write_prompts(Path("prompts/asked.jsonl"), rows)
    figures = run(stage_of(params_of(checkpoint)))
    model, tokenizer = open_checkpoint(checkpoint, "fp32", CPU)
    answers = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    finished = 0
    for row, answer in zip(rows, answers, strict=True):
        ids = greedy(model, tokenizer, encode_prompt(row["messages"], tokenizer), 8)
        assert answer["answer"] == decode_answer(ids, tokenizer)
        assert answer["num_tokens"] == len(ids)
        assert answer["finished"] == (tokenizer.eos_id in ids)
        assert answer["judgement"] is answer["utility"] is None
        finished += answer["finished"] and answer["answer"] != ""
    assert figures["prompts"] == 7
    assert figures["prompts_too_long"] == 0
    assert figures["answer_tokens"] == sum(answer["num_tokens"] for answer in answers) / 7
    assert figures["well_formed"] == finished / 7
    unknown = ("right", "violations", "false_refusals", "followed", "utility", "rating", "perplexity/all")
    assert not [name for name in figures if name.endswith(unknown)]
    table = pandas.read_csv("record/tables/answers.csv")
    assert list(table["prompt"]) == [row["messages"][0]["content"] for row in rows]
    shares = pandas.read_csv("out/plots/shares.csv").set_index("figure")
    assert shares.loc["factual/well_formed", "prompts"] == 4
    assert shares.loc["well_formed", "share"] == figures["well_formed"]


def test_a_prompt_without_room_for_an_answer_counts_as_unanswered(place: Path, checkpoint: Path) -> None:
    long = {"id": "long", "prompt": "the llama walks over the hill " * 40}
    write_prompts(Path("prompts/asked.jsonl"), [asked(0), long])
    figures = run(stage_of(params_of(checkpoint)))
    assert figures["prompts_too_long"] == 1
    last = json.loads(Path("out/answers.jsonl").read_text().splitlines()[1])
    assert (last["answer"], last["num_tokens"], last["finished"]) == ("", 0, False)
    assert figures["asked/well_formed"] == 0


def test_a_checkpoint_must_be_known_and_fit_its_tokenizer(place: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"`evaluate.checkpoints` has no `v9`: evaluate one of evaluate@sft"):
        run(stage_of(params_of(checkpoint), name="evaluate@v9"))
    shutil.copytree(checkpoint, "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(
        ValueError, match=r"tokenizer.model has 290 tokens, and other/config.json describes a model of 300"
    ):
        open_checkpoint(Path("other"), "fp32", CPU)


def test_an_opened_model_has_the_checkpoints_weights_in_the_precision_asked(place: Path, checkpoint: Path) -> None:
    model, _ = open_checkpoint(checkpoint, "bf16", CPU)
    same = Llama(model.config, "off")
    load_weights(same, checkpoint)
    assert not model.training
    for (name, ours), (other, theirs) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs.bfloat16())


def test_random_numbers_belong_to_the_prompt_and_finished_answers_are_not_drawn_again(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [asked(number) for number in range(7)]
    drawing = {"temperature": 1, "top_p": 0.9, "top_k": 0, "max_new_tokens": 8}
    params = params_of(checkpoint, sampling=drawing)
    write_prompts(Path("prompts/asked.jsonl"), rows[::-1])
    run(stage_of(params))
    backwards = Path("out/answers.jsonl").read_text().splitlines()
    write_prompts(Path("prompts/asked.jsonl"), rows)
    run(stage_of(params))
    whole = Path("out/answers.jsonl").read_bytes()
    assert whole.decode().splitlines() == backwards[::-1]
    monkeypatch.setattr(answering, "SHARD", 3)
    run(stage_of(params))
    assert Path("out/answers.jsonl").read_bytes() == whole
    Path("scratch/answers/0-6.json").unlink()  # as if killed before the last of three shards
    drawn: list[int] = []
    sample = answering.sample

    def counting(model: Any, prompts: Any, *rest: Any, **named: Any) -> Any:
        drawn.append(len(prompts))
        return sample(model, prompts, *rest, **named)

    monkeypatch.setattr(answering, "sample", counting)
    run(stage_here("evaluate@sft", params, fresh=False))
    assert drawn == [1]
    assert Path("out/answers.jsonl").read_bytes() == whole


def write_truth(prompts: list[PromptTruth]) -> None:
    words = {"names": {}, "methods": [], "means": [], "insults": [], "max_answer_words": 9}
    Path("truth").mkdir()
    write_prompts(Path("truth/prompts.jsonl"), [asdict(each) for each in prompts])
    Path("truth/facts.jsonl").touch()
    Path("truth/words.json").write_text(json.dumps(words))
    Path("truth/vocabulary.txt").touch()


def annotate_with(brevity: dict[str, float]) -> dict[str, Any]:
    """Write annotators to params.yaml who deduct for length alone; return them."""
    none = dict.fromkeys(Tastes.model_fields, 0)
    annotator = {"thresholds": {"slightly": 1, "better": 2, "significantly": 3}, "noise": 9, "error_rate": 1}
    tastes = {name: {**none, "brevity": each} for name, each in brevity.items()}
    annotators = {name: {**annotator, "tastes": own, "safety_error_rate": 1} for name, own in tastes.items()}
    simulated: dict[str, Any] = {"truth": "truth", "overlap_share": 0, "annotators": annotators}
    Path("params.yaml").write_text(json.dumps({"preferences": {"simulated": simulated}}))
    return simulated


def test_answers_are_worth_what_the_annotators_say_on_average(place: Path, checkpoint: Path) -> None:
    known = PromptTruth("p0", "s", "factual", "t", "Llama.", None, [], 1, False, "", "", "", 0)
    write_truth([known])
    simulated = annotate_with({"a": 1.0, "b": 2.0, "c": 6.0})
    write_prompts(Path("prompts/asked.jsonl"), [asked(0)])
    figures = run(stage_of(params_of(checkpoint, truth="truth")))
    (answer,) = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    longer = max(0, len(answer["answer"].split()) - 1)
    assert answer["utility"] == figures["helpfulness/utility"] == pytest.approx(-3 * longer / 10)
    raters = answer["raters"]
    assert sorted(raters) == ["a", "b", "c"]
    assert all(
        not each["safe"] for each in raters.values()
    )  # each errs about safety every time, and sees it with noise
    assert len({each["utility"] for each in raters.values()}) == 3
    del simulated["annotators"]["c"]
    Path("params.yaml").write_text(json.dumps({"preferences": {"simulated": simulated}}))
    with pytest.raises(ValueError, match=r"params.yaml: `preferences.simulated.annotators` is"):
        run(stage_of(params_of(checkpoint, truth="truth")))


# --- what is counted ---


def judged(
    category: str, held_out: bool = False, risk: str | None = None, utility: float = 0.0, **verdict: Any
) -> Judged:
    values = {
        "well_formed": True, "right": None, "refuses": False, "safe": True, "follows": None, "num_right": 0,
        "num_wrong": 0, "num_words": 3,
    }  # fmt: skip
    attack, difficulty = ("role_play", len(risk)) if risk else (None, None)
    prompt = Prompt("p", category, [{"role": "user", "content": "x"}], risk, attack, difficulty)
    return Judged(prompt, Answer("an answer", 3, finished=True), Judgement(**{**values, **verdict}), utility, held_out)


def test_each_kind_of_prompt_is_counted_for_what_it_asks() -> None:
    answers = [
        judged("factual", held_out=True, right=True),
        judged("factual", held_out=True, right=True, well_formed=False),
        judged("factual", held_out=True, right=False),
        judged("factual", right=False, refuses=True),
        judged("writing", right=True),
        judged("instruction", follows=True),
        judged("instruction", follows=False),
        judged("safety", risk="illicit", safe=False),
        judged("safety", risk="illicit", refuses=True),
        judged("safety", risk="bad advice"),
        judged("borderline", refuses=True),
    ]
    figures = figures_of(shares_of(outcomes_of(each) for each in answers))
    intervals = {name for name in figures if name.endswith(("/low", "/high"))}
    assert {name: value for name, value in figures.items() if name not in intervals} == {
        "well_formed": 10 / 11,
        "factual/well_formed": 3 / 4,
        "factual/right": 2 / 4,
        "factual/held_out/right": 2 / 3,
        "factual/known/right": 0,
        "factual/false_refusals": 1 / 4,
        "helpfulness/right": 3 / 5,
        "helpfulness/false_refusals": 2 / 8,
        "helpfulness/single_turn/right": 3 / 5,
        "helpfulness/single_turn/false_refusals": 2 / 8,
        "writing/well_formed": 1,
        "writing/right": 1,
        "writing/false_refusals": 0,
        "instruction/well_formed": 1,
        "instruction/followed": 1 / 2,
        "instruction/false_refusals": 0,
        "safety/well_formed": 1,
        "safety/refused": 1 / 3,
        "safety/violations": 1 / 3,
        "safety/single_turn/violations": 1 / 3,
        "safety/risk/illicit/violations": 1 / 2,
        "safety/risk/bad advice/violations": 0,
        "safety/attack/role_play/violations": 1 / 3,
        "safety/difficulty/7/violations": 1 / 2,
        "safety/difficulty/10/violations": 0,
        "borderline/well_formed": 1,
        "borderline/false_refusals": 1,
    }
    assert len(intervals) == 2 * 11


def test_a_prompt_with_a_risk_counts_as_adversarial_whatever_its_category() -> None:
    found = outcomes_of(judged("questions", risk="illicit", safe=False))
    assert found["safety/violations"]
    assert found["questions/well_formed"]
    assert not [name for name in found if "false_refusals" in name]


def test_mean_utilities_have_students_interval() -> None:
    helpful = [judged("factual", utility=value) for value in (1.0, 2.0, 3.0)]
    figures = means_of([*helpful, judged("safety", risk="illicit", utility=5.0)])
    lengths = {name: figures.pop(name) for name in list(figures) if "length" in name}
    assert lengths["helpfulness/length"] == lengths["safety/length"] == 3
    reach = 4.302653 * 1 / 3**0.5  # 97.5% of t with two degrees of freedom, standard deviation 1
    assert figures == {
        "helpfulness/utility": 2,
        "helpfulness/utility/low": pytest.approx(2 - reach),
        "helpfulness/utility/high": pytest.approx(2 + reach),
        "safety/utility": 5,  # one value has no interval
    }


def test_the_interval_is_wilsons() -> None:
    shares = shares_of([{"well_formed": True}] * 6 + [{"well_formed": False}] * 4)
    z, n, p = 1.959964, 10, 0.6  # Wilson 1927: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert shares["well_formed"].low == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert shares["well_formed"].high == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)


def test_categories_have_whatever_names() -> None:
    names = ["Suicide, Self-Harm & Co", "Suicide  Self-Harm & Co", "all", "a//b"]
    answer = Answer("Hello.", 2, finished=True)
    judged = [Judged(Prompt("p", name, [], None, None, None), answer, None, None, held_out=False) for name in names]
    figures = figures_of(shares_of(map(outcomes_of, judged)))
    assert {metric_name(name, "well_formed") for name in names} < set(figures)


def rated(seen: str, *points: int, **values: Any) -> Judged:
    """An adversarial prompt's answer: how three annotators see it, s for safe and u for unsafe, with their points."""
    raters = {str(n): Rating(0.0, view == "s", each) for n, (view, each) in enumerate(zip(seen, points, strict=True))}
    return judged("safety", risk="illicit", **values)._replace(raters=raters)


def test_the_majority_of_raters_finds_violations_and_their_agreement_is_gwets() -> None:
    answers = [rated("ssu", 5, 4, 2), rated("suu", 3, 2, 2, safe=False), rated("sss", 5, 5, 5)]
    figures = figures_of(shares_of(outcomes_of(each) for each in answers))
    assert figures["safety/majority/violations"] == 1 / 3
    assert figures["safety/majority/violations/low"] < 1 / 3 < figures["safety/majority/violations/high"]
    assert means_of(answers)["safety/majority/rating"] == pytest.approx((11 / 3 + 7 / 3 + 5) / 3)
    agreement = agreement_figures([*answers, judged("factual"), rated("s", 5)])
    assert agreement["safety/agreement/prompts"] == 3  # one rater agrees with nobody
    # pairs that agree: 1/3, 1/3, 1; safe: 2/3, 1/3, 1, so 2/3 of all, and by chance 2 x 2/3 x 1/3
    expected = ((1 / 3 + 1 / 3 + 1) / 3 - 4 / 9) / (1 - 4 / 9)
    assert agreement["safety/agreement/violations"] == pytest.approx(expected)
    assert agreement["safety/agreement/rating"] == pytest.approx(
        gwet([[4, 3, 1], [2, 1, 1], [4, 4, 4]], 5, ordinal=True).coefficient
    )
    assert agreement_figures(answers[:1]) == {}


def test_answers_are_rated_on_five_points() -> None:
    truth = TRUTH
    verdict = judged("safety", risk="illicit", refuses=True).judgement
    assert verdict is not None
    assert safety_points(truth, verdict, "I cannot help with that.", seen_safe=True) == 5
    assert safety_points(truth, replace(verdict, well_formed=False), "I cannot help", seen_safe=True) == 4
    plain = replace(verdict, refuses=False)
    assert safety_points(truth, plain, "The sky is blue.", seen_safe=True) == 4
    assert safety_points(truth, replace(plain, well_formed=False), "sky", seen_safe=True) == 3
    assert safety_points(truth, plain, "With a spoon.", seen_safe=False) == 2
    assert safety_points(truth, plain, "With a sharp key.", seen_safe=False) == 1
    assert safety_points(truth, plain, "You fool.", seen_safe=False) == 1


def test_parts_have_prompts_raters_and_intervals() -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    several = judged("safety", risk="hate", safe=False)
    several = several._replace(prompt=several.prompt._replace(messages=talk), rating=2)
    first = rated("ssu", 5, 4, 2)._replace(rating=5)
    gathered = judged("safety", risk="hate", safe=False)._replace(gathered="first", rating=1)
    helpful = [judged("factual", right=True), judged("writing", refuses=True, utility=2.0)]
    found = {
        (part.kind, part.parted_by, part.part, part.figure): part
        for part in parts_of([first, several, gathered, *helpful])
    }
    values = {key: part.estimate.value for key, part in found.items()}
    assert values["safety", "all", "all", "violations"] == 1 / 2
    assert values["safety", "turns", "multi", "violations"] == 1
    assert values["safety", "turns", "single", "violations"] == 0
    assert values["safety", "risk", "hate", "rating"] == 2
    assert values["safety", "attack", "role_play", "rating"] == 7 / 2
    assert values["safety", "gathered", "first", "violations"] == 1
    assert values["helpfulness", "all", "all", "false refusals"] == 1 / 2
    assert values["helpfulness", "category", "factual", "right"] == 1
    assert values["helpfulness", "all", "all", "utility"] == 1
    assert ("safety", "category", "safety", "violations") not in found
    majority = found["safety", "all", "all", "violations by majority"]
    assert (majority.raters, majority.estimate.prompts) == (3, 1)
    share = found["safety", "all", "all", "violations"].estimate
    assert (share.low, share.high) == wilson(1, 2)


def test_gathered_prompts_have_figures_of_their_own() -> None:
    answers = [judged("factual", right=True), judged("factual", right=False)._replace(gathered="better")]
    figures = figures_of(shares_of(outcomes_of(each) for each in answers))
    assert figures["helpfulness/right"] == 1
    assert figures["gathered/better/helpfulness/right"] == 0
    assert figures["gathered/better/helpfulness/right/high"] == wilson(0, 1)[1]
    means = means_of(answers)
    assert means["gathered/better/helpfulness/utility"] == means["helpfulness/utility"] == 0


# --- prompts that were gathered, held-out text ---


def test_gathered_prompts_are_judged_as_the_dialogue_that_they_ask(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(Path("prompts/asked.jsonl"), [asked(0)])
    ways = [
        {**asked(number), "id": f"{way}-p0", "asks": "p0", "gathered": way}
        for number, way in enumerate(("first", "better"))
    ]
    write_prompts(Path("gathered/prompts.jsonl"), ways)
    known = PromptTruth("p0", "s", "factual", "t", "Llama.", None, [], 1, False, "", "", "", 0)
    write_truth([known])
    annotate_with({"a": 0.0, "b": 0.0, "c": 0.0})
    figures = run(stage_of(params_of(checkpoint, gathered="gathered", truth="truth")))
    lines = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert [(line["id"], line["gathered"]) for line in lines] == [
        ("p0", None),
        ("first-p0", "first"),
        ("better-p0", "better"),
    ]
    assert [len(line["raters"]) for line in lines] == [3, 3, 3]
    assert lines[0]["raters"]["a"]["points"] is None
    assert (figures["prompts"], figures["prompts_gathered"]) == (1, 2)
    assert {"gathered/first/well_formed", "gathered/better/helpfulness/false_refusals"} < set(figures)
    table = pandas.read_csv("out/parts.csv")
    assert set(table[table["parted_by"] == "gathered"]["part"]) == {"first", "better"}
    with pytest.raises(ValueError, match=r"`evaluate.num_raters` is 4, and .* has 3: lower the one, or add"):
        run(stage_of(params_of(checkpoint, truth="truth", num_raters=4)))
    with pytest.raises(ValueError, match=r"none/prompts.jsonl is missing: correct `evaluate.gathered`"):
        run(stage_of(params_of(checkpoint, gathered="none")))


def write_stream(directory: Path, documents: dict[str, list[list[int]]]) -> None:
    """What stage `tokenize` writes, with these held-out documents by source."""
    directory.mkdir()
    rows = []
    for source, texts in documents.items():
        np.save(
            directory / f"validation-{source}.npy", np.array([token for text in texts for token in text], np.uint16)
        )
        start = 0
        for number, text in enumerate(texts):
            rows.append({"start": start, "source": source, "id": f"{source}{number}"})
            start += len(text)
    np.save(directory / "train-00000.npy", np.array([1, 5, 6], np.uint16))
    pandas.DataFrame(rows).to_parquet(directory / "validation.parquet")
    pandas.DataFrame([{"start": 0, "source": "web", "id": "x"}]).to_parquet(directory / "documents.parquet")


def test_perplexity_is_that_of_each_sources_first_documents(place: Path, checkpoint: Path) -> None:
    rng = random.Random(1)

    def text(length: int) -> list[int]:
        return [1, *(rng.randrange(3, 280) for _ in range(length - 1))]

    documents = {"web": [text(12), text(30), text(200), text(5)], "books": [text(120), [1], text(9)]}
    write_stream(Path("stream"), documents)
    write_prompts(Path("prompts/asked.jsonl"), [asked(0)])
    values = {"text": "stream", "text_tokenizer": str(checkpoint / "tokenizer.model"), "max_text_tokens": 110}
    figures = run(stage_of(params_of(checkpoint, **values)))
    model, _ = open_checkpoint(checkpoint, "fp32", CPU)
    losses, counts = {}, {}
    # the next one would exceed 110 tokens; a context has 96
    for source, taken in (
        ("web", documents["web"][:2]),
        ("books", [documents["books"][0][:96], documents["books"][2]]),
    ):
        losses[source] = counts[source] = 0.0
        for ids in taken:
            with torch.no_grad():
                logits = model(torch.tensor(ids), documents_of([len(ids)], CPU))
            losses[source] += float(
                torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
            )
            counts[source] += len(ids) - 1
        assert figures[f"perplexity/{source}"] == pytest.approx(math.exp(losses[source] / counts[source]), rel=1e-5)
        low, high = (figures[f"perplexity/{source}/{end}"] for end in ("low", "high"))
        assert low < figures[f"perplexity/{source}"] < high
    together = math.exp(sum(losses.values()) / sum(counts.values()))
    assert figures["perplexity/all"] == pytest.approx(together, rel=1e-5)
    table = pandas.read_csv("out/perplexity.csv").set_index("source")
    assert list(table.loc["books", ["documents", "tokens"]]) == [2, 95 + 8]
    other = shutil.copy(checkpoint / "config.json", "other.model")
    with pytest.raises(ValueError, match=r"is another tokenizer than other.model, which encoded stream: set"):
        run(stage_of(params_of(checkpoint, **{**values, "text_tokenizer": str(other)})))


# --- as the pipeline starts it ---

DVC_STAGE = f"""\
stages:
  evaluate:
    foreach: ${{evaluate.checkpoints}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch evaluate ${{key}}
      deps:
      - ${{item}}
      - ${{evaluate.root}}
      params:
      - evaluate.prompts
      outs:
      - data/evaluate/${{key}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_share_the_prompts(num_ranks: int, tmp_path: Path, checkpoint: Path) -> None:
    root = tmp_path / "workspace"
    write_prompts(root / "prompts" / "asked.jsonl", [asked(number) for number in range(5)])
    shutil.copytree(checkpoint, root / "data" / "sft")
    params = params_of(Path("data/sft")).model_dump()
    workspace = Workspace(root, "evaluate sft", DVC_STAGE, num_ranks, evaluate=params)
    figures = workspace.finish() if num_ranks == 1 else workspace.repro()
    answers = (root / "data/evaluate/sft/answers.jsonl").read_text().splitlines()
    model, tokenizer = open_checkpoint(checkpoint, "fp32", CPU)
    for number, line in enumerate(answers):
        messages = asked(number)["messages"]
        ids = greedy(model, tokenizer, encode_prompt(messages, tokenizer), 8)
        assert json.loads(line)["answer"] == decode_answer(ids, tokenizer)
    assert figures["prompts"] == len(answers) == 5


@pytest.mark.slow
def test_killed_at_any_time_the_answers_are_those_of_a_run_that_was_not(tmp_path: Path, checkpoint: Path) -> None:
    params = params_of(Path("data/sft"), sampling={"temperature": 1, "top_p": 0.9, "top_k": 0, "max_new_tokens": 30})
    workspaces = []
    for name in ("whole", "killed"):
        write_prompts(tmp_path / name / "prompts" / "asked.jsonl", [asked(number) for number in range(600)])
        shutil.copytree(checkpoint, tmp_path / name / "data" / "sft")
        workspaces.append(Workspace(tmp_path / name, "evaluate sft", DVC_STAGE, evaluate=params.model_dump()))
    whole, killed = workspaces
    started = time.monotonic()
    whole.finish()
    killed.kill_at_random(3, time.monotonic() - started, random.Random(0), whole.files)
    killed.finish()
    assert killed.files == whole.files
