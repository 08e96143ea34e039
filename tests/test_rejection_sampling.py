from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from stages import Workspace, stage_here
from test_evaluate import write_prompts

from model.network.checkpoint import open_checkpoint
from model.network.transformer import Llama, ModelConfig, first_weights
from model.network.weights import fill_weights
from model.sampling.sampler import Response, Sampling, sample
from model.scoring.reward import RewardModel, draw_heads, open_reward, save_reward, score
from model.text.dialogue import decode_answer, encode_answer, encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model
from tasks.judging.calibration import Line
from tasks.judging.ranking import Scales
from tasks.judging.scales import calibrate
from tasks.reading.dialogues import DialogueSource, read_dialogues
from tasks.reading.prompts import KINDS, Prompt
from tasks.reading.shares import at_most, share_of
from tasks.rejection_sampling.__main__ import run
from tasks.rejection_sampling.reporting import draws_of, report_truth, reward_curve, sizes_up_to
from tasks.running.digests import number_of
from tasks.running.files import read_lines, write_lines
from tasks.running.params import parse_section
from tasks.running.stage import Stage
from tasks.sampling.choosing import Choice, choose, dialogue_of, merged, sample_line
from tasks.sampling.drawing import Candidate, distinct
from tasks.sampling.params import Params
from tasks.world.annotators import Annotators
from tasks.world.judge import read_truth

CPU = torch.device("cpu")
QUESTIONS = ["where does the llama walk?", "who walks over the hill?", "a hill or a llama?", "12 steps?", "over the"]
NOTHING = "data/seeds/none"
ROUND = {
    "newest": "chat", "earlier": "early", "batches": "pairs",
    **dict.fromkeys(("samples", "distil_from", "ghost_attention", "context_distillation"), NOTHING),
}  # fmt: skip
OUTPUTS = ("samples.jsonl", "unanswered.jsonl", "best.jsonl", "random.jsonl", "calibration.json")


# --- a small world: a chat model that ends its answers now and then, reward models, prompts ---


def write_chat(directory: Path, tokenizer: Path, ends: float = 4.5) -> None:
    """A chat model of random weights; the greater `ends`, the sooner its answers end."""
    from model.network.checkpoint import save_model

    config = ModelConfig.model_validate(
        {**SMALL, "vocab_size": 290, "max_position_embeddings": 64, "initializer_range": 0.1}
    )
    model = build_model(Llama, config, EngineParams.model_validate(TRAINED))
    generator = torch.Generator().manual_seed(1)
    fill_weights(model, lambda name, shape: first_weights(name, shape, config, generator))
    with torch.no_grad():  # all states have a part in common, which the logit of EOS looks at
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[2] = ends / SMALL["hidden_size"]
    save_model(model, Tokenizer(tokenizer), directory, {"step": 1}, 10**9)


def write_reward(directory: Path, tokenizer: Path, seed: int, vocab_size: int = 290) -> None:
    config = ModelConfig.model_validate(
        {**SMALL, "vocab_size": vocab_size, "max_position_embeddings": 64, "initializer_range": 0.3}
    )
    model = build_model(partial(RewardModel, tells_safety=False), config, EngineParams.model_validate(TRAINED))
    generator = torch.Generator().manual_seed(seed)
    fill_weights(model.model, lambda name, shape: first_weights(name, shape, config, generator))
    draw_heads(model, seed)
    save_reward(model, Tokenizer(tokenizer), directory, {"step": 1}, 10**9)


def scores_row(kind: str, chosen: float, rejected: float, *safe: bool | None) -> dict[str, Any]:
    row = {"kind": kind, "chosen_score": chosen, "rejected_score": rejected}
    return {**row, **dict(zip(("chosen_safe", "rejected_safe"), safe or (None, None), strict=True))}


HELPFULNESS_SCORES = [scores_row("helpfulness", 1, 0), scores_row("helpfulness", 2, 0), scores_row("helpfulness", 0, 1)]
SAFETY_SCORES = [scores_row("safety", n / 4, -n / 4, True, False) for n in range(1, 9)]
SAFETY_SCORES += [scores_row("helpfulness", 9, -9), scores_row("safety", 0.1, 0.3, True, False)]


def write_models(root: Path, round_name: str) -> None:
    """A chat model and the two reward models of a round, with their tokenizer and their scores of held-out pairs."""
    join_alone()
    tokenizer = train_tokenizer(root, [*QUESTIONS, "[INST] the llama walks over the hill [/INST]"])
    write_chat(root / "chat", tokenizer)
    for seed, kind in enumerate(KINDS):
        directory = root / "data" / f"reward_{kind}" / round_name
        write_reward(directory, tokenizer, seed)
        write_lines(directory / "scores.jsonl", HELPFULNESS_SCORES if kind == "helpfulness" else SAFETY_SCORES)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root, "v1")
    return root


def asked(number: int, kind: str = "helpfulness") -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{QUESTIONS[number % len(QUESTIONS)]} {number}"}]
    row = {"id": f"{kind[0]}{number}", "messages": messages, "category": ("factual", "writing")[number % 2]}
    return {**row, "category": "safety", "risk": "illicit", "attack": "role_play"} if kind == "safety" else row


PROMPTS = {"helpfulness": [asked(number) for number in range(40)], "safety": [asked(n, "safety") for n in range(24)]}


def write_world(root: Path, models: Path, **round_changes: Any) -> None:
    shutil.copytree(models / "chat", root / "chat")
    shutil.copytree(models / "data", root / "data")
    for kind, rows in PROMPTS.items():
        write_prompts(root / f"prompts/{kind}.jsonl", rows)
    write_prompts(root / "evaluation/asked.jsonl", [{**asked(99), "id": "e"}])
    write_params(root, **round_changes)


def write_params(root: Path, **round_changes: Any) -> None:
    sections = {
        "rounds": {"v1": {**ROUND, **round_changes}},
        "evaluate": {"root": "evaluation", "prompts": ["asked.jsonl"]},
    }
    with (root / "params.yaml").open("w") as file:
        YAML().dump(sections, file)


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    join_alone()
    write_world(tmp_path, models)
    return tmp_path


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        "prompts": {kind: f"prompts/{kind}.jsonl" for kind in KINDS},
        "max_prompts": {"helpfulness": 8, "safety": 5}, "num_search_prompts": {"helpfulness": 3, "safety": 2},
        "num_rounds": 2, "num_samples": {"helpfulness": 4, "safety": 6}, "temperatures": [0.8, 1.1],
        "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "threshold_precision": 0.8,
        "log_probability_weight": {"helpfulness": 0.0, "safety": 0.0}, "truth": None, "precision": "fp32",
        "max_rows": 8, "tokens_at_once": 200, "save_every": 3,
    }  # fmt: skip
    return {**values, **changes}


def stage_of(fresh: bool = True, name: str = "rejection_sampling@v1", **changes: Any) -> Stage[Params]:
    return stage_here(name, Params.model_validate(values_of(**changes)), fresh)


def lines_of(name: str) -> list[dict[str, Any]]:
    return read_lines(Path("out", name))


def outputs() -> dict[str, bytes]:
    return {name: Path("out", name).read_bytes() for name in OUTPUTS}


# --- a whole run ---


def test_samples_are_the_policys_and_scores_the_reward_models(place: Path) -> None:
    figures = run(stage_of())
    model, tokenizer = open_checkpoint(Path("chat"), "fp32", CPU)
    samples = lines_of("samples.jsonl") + lines_of("unanswered.jsonl")
    assert len(samples) == 8 + 5
    rewards = {kind: open_reward(Path(f"data/reward_{kind}/v1"), "fp32", CPU)[0] for kind in KINDS}
    for line in samples:
        temperature = figures[f"{line['kind']}/temperature"]
        num_samples = 4 if line["kind"] == "helpfulness" else 6
        assert line["temperature"] == temperature
        seed = number_of(f"1 rejection v1 {line['id']} {temperature}")
        drawn = Sampling(temperature=temperature, top_p=1, top_k=0, max_new_tokens=8)
        prompt = encode_prompt(line["messages"], tokenizer)
        (responses,) = sample(
            model, [prompt], drawn, num_samples=num_samples, eos_id=2, seeds=[seed], max_rows=9, description=None
        )
        keys = [(decode_answer(each.ids, tokenizer), each.finished) for each in responses]
        candidates = line["candidates"]
        assert [(each["text"], each["finished"]) for each in candidates] == list(dict.fromkeys(keys))
        for each in candidates:
            response = responses[keys.index((each["text"], each["finished"]))]
            assert each["log_probability"] == pytest.approx(sum(response.log_probabilities), abs=1e-4)
            assert each["num_tokens"] == len(response.ids)
            assert each["draws"] == keys.count((each["text"], each["finished"]))
            dialogue = [*prompt, *encode_answer(line["messages"], each["text"], tokenizer)]
            for kind, reward in rewards.items():
                assert each[kind] == pytest.approx(score(reward, [dialogue], 10**6)[0], abs=1e-4)


def test_the_best_is_chosen_and_a_random_one_beside_it(place: Path) -> None:
    figures = run(stage_of())
    calibration = json.loads(Path("out/calibration.json").read_text())
    safety, threshold = Line(**calibration["safety"]), calibration["threshold"]
    samples = lines_of("samples.jsonl")
    assert any(line["best"] != line["random"] for line in samples)
    for line in samples:
        possible = [n for n, each in enumerate(line["candidates"]) if each["finished"] and each["text"]]
        assert line["best"] in possible
        drawn = [n for n in possible for _ in range(line["candidates"][n]["draws"])]
        assert line["random"] == drawn[number_of(f"1 random {line['id']}") % len(drawn)]
        for each in line["candidates"]:
            assert each["safe_probability"] == pytest.approx(safety.probability(each["safety"]))
            is_safety = line["kind"] == "safety" or each["safe_probability"] < threshold
            assert each["branch"] == ("safety" if is_safety else "helpfulness")
            scale = calibration[each["branch"]]
            assert each["reward"] == pytest.approx(scale["slope"] * each[each["branch"]] + scale["intercept"])
        branches = {line["candidates"][n]["branch"] for n in possible}
        branch = "helpfulness" if "helpfulness" in branches else "safety"
        in_branch = [n for n in possible if line["candidates"][n]["branch"] == branch]
        assert line["best"] == max(in_branch, key=lambda n: line["candidates"][n]["reward"])
    for way in ("best", "random"):
        dialogues = {each["id"]: each for each in lines_of(f"{way}.jsonl")}
        assert list(dialogues) == [line["id"] for line in samples]
        for line in samples:
            answer = {"role": "assistant", "content": line["candidates"][line[way]]["text"]}
            assert dialogues[line["id"]] == {
                "id": line["id"], "messages": [*line["messages"], answer], "category": line["category"],
                "safety": line["kind"] == "safety", "source": "v1", "kind": line["kind"],
            }  # fmt: skip
    source = DialogueSource(
        files=["best.jsonl"], format="auto", max_dialogues=None, validation_share=0, weight=1, loss="last"
    )
    read, refused = read_dialogues(Path("out"), {"v1": source}, "fine_tuning", 0.0)
    assert (len(read), refused) == (len(samples), [])
    assert [each["safety"] for each in read] == [line["kind"] == "safety" for line in samples]
    assert figures["dialogues"] == len(samples)
    assert figures["dialogues_earlier"] == 0
    # held-out labels: 8 unsafe, safe at 0.1 and 0.25, unsafe at 0.3, then 7 safe; the first 11 are called unsafe
    assert (figures["threshold/labels"], figures["threshold/unsafe"]) == (18, 9)
    assert figures["threshold"] == threshold
    assert (figures["threshold/precision"], figures["threshold/recall"]) == (9 / 11, 1.0)


def test_prompts_to_search_on_are_not_those_that_are_trained_on(place: Path) -> None:
    figures = run(stage_of())
    for kind in KINDS:
        prompts = [Prompt(row["id"], "", row["messages"], None, None, None) for row in PROMPTS[kind]]
        share = share_of(prompts, 0, 2)
        search = {p.id for p in at_most(share, values_of()["num_search_prompts"][kind], "search")}
        samples = [each for each in lines_of("samples.jsonl") + lines_of("unanswered.jsonl") if each["kind"] == kind]
        ids = {each["id"] for each in samples}
        assert len(ids) == min(values_of()["max_prompts"][kind], len(share) - len(search))
        assert not ids & search
        assert ids <= {prompt.id for prompt in share}
        # the temperature is the one whose best reward is the greatest on the prompts to search on
        table = pandas.read_csv("out/plots/temperatures.csv")
        own = table[(table["kind"] == kind) & (table["statistic"] == "max")]
        assert sorted(own["temperature"]) == [0.8, 1.1]
        assert set(own["prompts"]) == {len(search)}
        assert figures[f"{kind}/temperature"] == own.loc[own["reward"].idxmax(), "temperature"]
    chosen = {each["id"] for each in lines_of("best.jsonl")}
    run(stage_of(temperatures=[1.1]))
    again = lines_of("samples.jsonl") + lines_of("unanswered.jsonl")
    assert chosen <= {each["id"] for each in again}  # the grid changes no prompt
    table = pandas.read_csv("out/plots/temperatures.csv")
    assert set(table["temperature"]) == {1.1}
    assert not list(Path("scratch/samples").glob("search*"))


def test_the_lower_of_two_temperatures_alike_is_taken(place: Path) -> None:
    write_chat(Path("sure"), Path("chat/tokenizer.model"), ends=400.0)  # says nothing, at any temperature
    write_params(place, newest="sure")
    with pytest.raises(ValueError, match="none of the"):
        run(stage_of(temperatures=[1.3, 0.9]))
    assert {path.name for path in Path("scratch/samples").glob("draw-*")} >= {"draw-helpfulness-0.9-0.json"}


def test_the_same_run_gives_the_same_bytes_and_another_seed_other_answers(place: Path) -> None:
    figures = run(stage_of())
    before = outputs()
    assert run(stage_of()) == figures
    assert outputs() == before
    assert run(stage_of(max_rows=3, tokens_at_once=10**6))["dialogues"] == figures["dialogues"]
    texts = [[each["text"] for each in line["candidates"]] for line in lines_of("samples.jsonl")]
    assert texts == [
        [each["text"] for each in json.loads(line)["candidates"]] for line in before["samples.jsonl"].splitlines()
    ]
    other = stage_of()
    other.seed = 2
    run(other)
    assert outputs()["samples.jsonl"] != before["samples.jsonl"]


def test_log_probability_counts_as_it_is_weighted(place: Path) -> None:
    run(stage_of(log_probability_weight={"helpfulness": 1e6, "safety": 0.0}))
    for line in lines_of("samples.jsonl"):
        possible = [n for n, each in enumerate(line["candidates"]) if each["finished"] and each["text"]]
        if line["kind"] == "helpfulness":
            branches = {line["candidates"][n]["branch"] for n in possible}
            branch = "helpfulness" if "helpfulness" in branches else "safety"
            in_branch = [n for n in possible if line["candidates"][n]["branch"] == branch]
            assert line["best"] == max(in_branch, key=lambda n: line["candidates"][n]["log_probability"])


def test_one_sample_a_prompt_leaves_no_choice(place: Path) -> None:
    figures = run(stage_of(num_samples={"helpfulness": 1, "safety": 1}, temperatures=[0.8]))
    for kind in KINDS:
        assert figures[f"{kind}/same_as_random"] == figures[f"{kind}/identical"] == figures[f"{kind}/answered"]
        assert figures[f"{kind}/samples"] == figures[f"{kind}/prompts"]
    assert Path("out/best.jsonl").read_bytes() == Path("out/random.jsonl").read_bytes()
    curve = pandas.read_csv("out/plots/rewards.csv")
    assert set(curve["samples"]) == {1}


def test_a_kind_without_prompts_is_not_drawn(place: Path) -> None:
    Path("prompts/safety.jsonl").unlink()
    figures = run(stage_of(max_prompts={"helpfulness": 4, "safety": 0}))
    assert {line["kind"] for line in lines_of("best.jsonl")} == {"helpfulness"}
    assert not any(name.startswith("safety/") for name in figures)
    shutil.rmtree("data")
    assert run(stage_of(max_prompts={"helpfulness": 0, "safety": 0}))["dialogues"] == 0
    assert lines_of("best.jsonl") == []


# --- the rules ---


def candidate(text: str, helpfulness: float, safety: float = 9.0, **changes: Any) -> Candidate:
    values = {"finished": True, "num_tokens": 3, "log_probability": -1.0, "round": "v1", "draws": 1}
    return Candidate(text=text, helpfulness=helpfulness, safety=safety, **{**values, **changes})  # type: ignore[typeddict-item]


SCALES = Scales(Line(1.0, 0.0), Line(1.0, 0.0), threshold=0.5)
PROMPT = Prompt("p", "factual", [{"role": "user", "content": "who?"}], None, None, None)


def chosen_of(candidates: list[Candidate], seed: int = 1, kind: Any = "helpfulness") -> Any:
    return choose(kind, PROMPT, 1.0, candidates, SCALES, 0.0, seed)


def test_duplicates_are_one_candidate_the_first() -> None:
    class Letters:
        eos_id = 2

        def decode(self, ids: list[int]) -> str:
            return " ".join("abc"[token - 3] for token in ids)

    responses = [
        Response([3, 4, 2], [-1.0, -2.0, -3.0], finished=True),
        Response([3, 4], [-1.0, -2.0], finished=False),  # the same text, but cut
        Response([3, 4, 2], [-1.5, -2.5, -3.5], finished=True),
        Response([2], [-4.0], finished=True),
    ]
    found = distinct(responses, Letters(), "v3")  # type: ignore[arg-type]
    assert [(each["text"], each["finished"], each["draws"]) for each in found] == [
        ("a b", True, 2), ("a b", False, 1), ("", True, 1),
    ]  # fmt: skip
    assert [each["log_probability"] for each in found] == [-6.0, -3.0, -4.0]
    assert {each["round"] for each in found} == {"v3"}


def test_empty_and_cut_answers_are_never_chosen_over_others() -> None:
    candidates = [
        candidate("cut", 9.0, finished=False),
        candidate("", 8.0),
        candidate("says [INST]", 7.0),
        candidate("plain", -5.0),
    ]
    for seed in range(20):
        found = chosen_of(candidates, seed)
        assert (found.best, found.random, found.is_answered) == (3, 3, True)
    assert not chosen_of(candidates[:3]).is_answered
    line = sample_line(chosen_of(candidates[:3]), "v1", "chat", SCALES)
    assert "best" not in line
    assert [each["reward"] for each in line["candidates"]] == [9.0, 8.0, 7.0]


def test_ties_go_to_the_first_and_chance_reaches_all() -> None:
    candidates = [candidate("a", 1.0), candidate("b", 2.0), candidate("c", 2.0)]
    assert chosen_of(candidates).best == 1
    assert {chosen_of(candidates, seed).random for seed in range(50)} == {0, 1, 2}
    often = [candidate("a", 1.0, draws=97), candidate("b", 2.0), candidate("c", 2.0, draws=0)]
    picks = [chosen_of(often, seed).random for seed in range(200)]
    assert picks.count(0) > 180  # chance gives what the model says often
    assert 2 not in picks  # an earlier round's answer, which nobody drew
    assert chosen_of([candidate("a", 1.0, draws=8)]).best == 0  # all the same: that one


def test_answers_that_are_called_unsafe_come_after_the_others() -> None:
    candidates = [candidate("a", 5.0, safety=-0.1), candidate("b", -3.0, safety=0.1), candidate("c", -4.0, safety=3.0)]
    assert chosen_of(candidates).order == [1, 2, 0]
    assert chosen_of(candidates, kind="safety").order == [2, 1, 0]


def test_a_new_dialogue_takes_an_earlier_ones_place() -> None:
    earlier = [{"id": "a", "source": "v1"}, {"id": "b", "source": "v1"}]
    assert merged(earlier, [{"id": "c", "source": "v2"}, {"id": "a", "source": "v2"}]) == [
        {"id": "a", "source": "v2"}, {"id": "b", "source": "v1"}, {"id": "c", "source": "v2"},
    ]  # fmt: skip


def test_an_answers_ids_are_those_of_its_dialogue(models: Path) -> None:
    tokenizer = Tokenizer(models / "chat" / "tokenizer.model")
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "who?"}]
    messages = [*messages, {"role": "assistant", "content": "the llama"}, {"role": "user", "content": "over a hill?"}]
    whole = encode_dialogue([*messages, {"role": "assistant", "content": "walks, 12"}], tokenizer).ids
    assert [*encode_prompt(messages, tokenizer), *encode_answer(messages, " walks, 12", tokenizer)] == whole
    assert encode_answer(messages, "", tokenizer)[-1] == tokenizer.eos_id


# --- earlier rounds ---


def dialogue(name: str, text: str, number: int = 0, source: str = "v0") -> dict[str, Any]:
    messages = [*asked(number)["messages"], {"role": "assistant", "content": text}]
    about = {"category": "factual", "safety": False, "source": source, "kind": "helpfulness"}
    return {"id": name, "messages": messages, **about}


def write_earlier(best: list[dict[str, Any]], random: list[dict[str, Any]], directory: str = "samples") -> None:
    Path(directory).mkdir(exist_ok=True)
    write_lines(Path(directory, "best.jsonl"), best)
    write_lines(Path(directory, "random.jsonl"), random)


def own_ids() -> list[str]:
    prompts = [Prompt(row["id"], "", row["messages"], None, None, None) for row in PROMPTS["helpfulness"]]
    share = share_of(prompts, 0, 2)
    search = {prompt.id for prompt in at_most(share, 3, "search")}
    return [prompt.id for prompt in at_most([prompt for prompt in share if prompt.id not in search], 8)]


def test_the_best_of_all_earlier_rounds_is_kept(place: Path) -> None:
    first = own_ids()[0]
    number = int(first[1:])
    alone = run(stage_of())
    line = next(line for line in lines_of("samples.jsonl") + lines_of("unanswered.jsonl") if line["id"] == first)
    # the same text under another id is another prompt
    earlier = [dialogue("old", "the hill", number), dialogue(first, "the llama", number)]
    write_earlier(earlier, [dialogue("old", "a hill", number), dialogue(first, "walks", number)])
    write_params(place, samples="samples")
    figures = run(stage_of())
    assert (figures["dialogues_earlier"], figures["dialogues"]) == (2, alone["dialogues"] + 1)
    best = {each["id"]: each for each in lines_of("best.jsonl")}
    assert best["old"] == earlier[0]
    assert {each["id"]: each for each in lines_of("random.jsonl")}["old"]["messages"][-1]["content"] == "a hill"
    again = next(each for each in lines_of("samples.jsonl") if each["id"] == first)
    before, *drawn = again["candidates"]
    assert (before["text"], before["round"], before["draws"], before["finished"]) == ("the llama", "v0", 0, True)
    # the others are as they were, with the earlier one among those scored
    assert [each["text"] for each in drawn] == [each["text"] for each in line["candidates"]]
    for kind in KINDS:
        reward, tokenizer = open_reward(Path(f"data/reward_{kind}/v1"), "fp32", CPU)
        ids = encode_dialogue(earlier[1]["messages"], tokenizer).ids
        assert before[kind] == pytest.approx(score(reward, [ids], 10**6)[0], abs=1e-4)
    winner = again["candidates"][again["best"]]
    assert best[first]["source"] == winner["round"]
    assert best[first]["messages"][-1]["content"] == winner["text"]


def test_an_earlier_answer_that_is_drawn_again_stays_the_earlier_rounds(place: Path) -> None:
    run(stage_of())
    line = next(line for line in lines_of("samples.jsonl") if line["kind"] == "helpfulness")
    text = line["candidates"][line["best"]]["text"]
    write_earlier([dialogue(line["id"], text, int(line["id"][1:]))], [])
    write_params(place, samples="samples")
    figures = run(stage_of())
    again = next(each for each in lines_of("samples.jsonl") if each["id"] == line["id"])
    assert again["candidates"][0]["draws"] == line["candidates"][line["best"]]["draws"]
    assert (again["best"], len(again["candidates"])) == (0, len(line["candidates"]))
    assert {each["id"]: each["source"] for each in lines_of("best.jsonl")}[line["id"]] == "v0"
    assert figures["helpfulness/earlier_best"] == 0  # it was drawn, too


def test_another_models_samples_take_the_place_of_own_ones(place: Path) -> None:
    write_earlier([dialogue("old", "the hill"), dialogue("both", "a")], [dialogue("old", "a hill")])
    write_earlier([dialogue("new", "over", source="v1"), dialogue("both", "b", source="v1")], [], "larger")
    write_params(place, samples="samples", distil_from="larger")
    shutil.rmtree("data")  # no reward model, nothing to calibrate
    shutil.rmtree("chat")
    figures = run(stage_of())
    assert figures == {"distilled": 2, "dialogues": 3, "dialogues_earlier": 2}
    assert {each["id"]: each["source"] for each in lines_of("best.jsonl")} == {"old": "v0", "both": "v1", "new": "v1"}
    assert lines_of("samples.jsonl") == []


@pytest.mark.parametrize("field", ["samples", "distil_from"])
def test_samples_that_are_missing_are_named(field: str, place: Path) -> None:
    write_params(place, **{field: "data/rejection_sampling/v0"})
    with pytest.raises(
        ValueError,
        match=rf"v0/best.jsonl is missing, though `rounds.v1.{field}` names its directory: run the stage",
    ):
        run(stage_of())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it needs `id`, `category`, `source` and `messages`"),
        (json.dumps({**dialogue("a", "b"), "kind": "other"}), "`kind` is helpfulness or safety, and `safety` says the"),
        (json.dumps({**dialogue("a", "b"), "safety": True}), "`kind` is helpfulness or safety, and `safety` says the"),
        (json.dumps({**dialogue("a", "b"), "messages": ["x"]}), "`messages` is not a list of objects"),
        (json.dumps({**dialogue("a", "b"), "messages": []}), "the dialogue holds no turn"),
        (json.dumps({**dialogue("a", "b"), "messages": asked(1)["messages"]}), "it ends with the prompt: the answer"),
        (json.dumps(dialogue("old", "b")), "its id old belongs to another line too"),
    ],
)
def test_a_line_that_is_no_sample_is_named(line: str, message: str, place: Path) -> None:
    write_earlier([dialogue("old", "the hill")], [])
    with Path("samples/best.jsonl").open("a") as file:
        file.write(line + "\n")
    write_params(place, samples="samples")
    with pytest.raises(ValueError, match=rf"samples/best.jsonl, line 2 is not a sample that was chosen: {message}"):
        run(stage_of())


def test_an_id_that_stood_for_another_prompt_is_refused(place: Path) -> None:
    first = own_ids()[0]
    write_earlier([dialogue(first, "the llama", int(first[1:]) + 1)], [])
    write_params(place, samples="samples")
    with pytest.raises(
        ValueError, match=rf"prompt {first} asks something else than the prompt of that id in the samples of `rounds.v1"
    ):
        run(stage_of())


# --- the report ---


def test_the_reward_curve_by_hand() -> None:
    # one prompt with rewards 3, 1, 1 (drawn twice), 0; at N = 2, the six pairs have maxima 3 3 3 1 1 1
    choice = chosen_of(
        [candidate("a", 1.0, draws=2), candidate("b", 3.0), candidate("c", 0.0), candidate("d", 9.0, draws=0)]
    )
    assert draws_of(choice) == [1, 0, 0, 2]
    curve = {(row["samples"], row["statistic"]): row["reward"] for row in reward_curve([choice])}
    assert curve == pytest.approx(
        {
            (1, "max"): 1.25, (1, "median"): 1.25, (1, "mean"): 1.25,
            (2, "max"): 2.0, (2, "median"): 1.25, (2, "mean"): 1.25,
            (4, "max"): 3.0, (4, "median"): 1.0, (4, "mean"): 1.25,
        }
    )  # fmt: skip
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(12) == [1, 2, 4, 8, 12]


TASTES = {"right": 1.0, "facts": 0.0, "close": 0.0, "words": 0.0, "well_formed": 0.0, "follows": 0.0, "refusal": 0.5}
TASTES |= {"brevity": 0.0, "harm": 0.0, "safe": 2.0}


def annotators(*rights: float) -> dict[str, Any]:
    fixed = {
        "thresholds": {"slightly": 0.1, "better": 0.5, "significantly": 1.0}, "noise": 0, "error_rate": 0,
        "safety_error_rate": 0,
    }  # fmt: skip
    named = {f"a{number}": {"tastes": {**TASTES, "right": right}, **fixed} for number, right in enumerate(rights)}
    return {"truth": "truth", "overlap_share": 0.2, "annotators": named}


def prompt_truth(identity: str, category: str, names: list[str] | None = None, risk: str = "") -> dict[str, Any]:
    check = None if names is None else {"check": "names", "required": [names], "forbidden": []}
    return {
        "id": identity, "split": "s", "category": category, "task": "t", "reference": "", "check": check,
        "instructions": [], "num_turns": 1, "held_out": False, "topic": "", "risk": risk, "attack": "",
        "difficulty": 1,
    }  # fmt: skip


def write_truth(prompts: list[dict[str, Any]]) -> None:
    Path("truth").mkdir(exist_ok=True)
    write_lines(Path("truth/facts.jsonl"), [])
    write_lines(Path("truth/prompts.jsonl"), prompts)
    words = {"names": {}, "methods": ["bent wire"], "means": [], "insults": ["pig"], "max_answer_words": 20}
    Path("truth/words.json").write_text(json.dumps(words))
    Path("truth/vocabulary.txt").write_text("wire\n")


def test_what_the_judge_says_of_the_chosen_by_hand(place: Path) -> None:
    write_truth([
        prompt_truth("home", "factual", ["velmar"]),
        prompt_truth("write", "writing", ["velmar"]),
        prompt_truth("hello", "dialogue"),
        prompt_truth("lock", "safety", risk="illicit"),
        prompt_truth("door", "safety", risk="illicit"),
    ])  # fmt: skip
    truth = read_truth(Path("truth"))

    def choice_of(identity: str, category: str, *candidates: Candidate) -> Choice:
        prompt = Prompt(identity, category, [{"role": "user", "content": "?"}], None, None, None)
        found = choose("safety" if category == "safety" else "helpfulness", prompt, 1.0, candidates, SCALES, 0.0, 1)
        return found._replace(random=len(candidates) - 1)

    helpful = [
        choice_of("home", "factual", candidate("In Ostra.", 3.0), candidate("In Velmar.", 1.0)),  # the worse wins
        choice_of("write", "writing", candidate("To Velmar.", 2.0), candidate("I cannot help.", 1.0)),
        choice_of("hello", "dialogue", candidate("Well.", 2.0, draws=2)),
    ]
    safety = [
        choice_of("lock", "safety", candidate("I cannot help.", 0.0, 2.0), candidate("A bent wire.", 0.0, 1.0)),
        choice_of("door", "safety", candidate("A bent wire.", 0.0, 2.0), candidate("No.", 0.0, -2.0)),
    ]
    chosen: Any = {"helpfulness": helpful, "safety": safety}
    stage = stage_of()
    figures = report_truth(stage, chosen, truth, Annotators.model_validate(annotators(1.0, 2.0, 3.0)).annotators)
    # an average annotator gives 2 for what is right, deducts 0.5 for a refusal that is not due, and gives 2.5 for one
    # that is and 2 for another safe answer
    assert figures["helpfulness/judge/utility"] == pytest.approx((0 + 2 + 0) / 3)
    assert figures["helpfulness/judge/utility/random"] == pytest.approx((2 - 0.5 + 0) / 3)
    assert figures["helpfulness/judge/utility/gain"] == pytest.approx((-2 + 2.5 + 0) / 3)
    assert figures["helpfulness/judge/right"] == figures["helpfulness/judge/right/random"] == 0.5
    assert (figures["helpfulness/judge/factual_right"], figures["helpfulness/judge/factual_right/random"]) == (0, 1)
    assert (figures["helpfulness/judge/refusals"], figures["helpfulness/judge/refusals/random"]) == (0, 1 / 3)
    assert (figures["safety/judge/violations"], figures["safety/judge/violations/random"]) == (0.5, 0.5)
    assert figures["safety/judge/utility"] == pytest.approx((2.5 + 0) / 2)
    # of one sample, the mean of both: (1 + 0.75 + 0) / 3, less than the best of two, (0 + 2 + 0) / 3
    assert figures["helpfulness/judge/utility/most_at"] == 2
    table = pandas.read_csv("out/plots/judge_utility.csv").set_index(["series", "samples"])
    assert table.loc[("helpfulness: utility, chosen", 1), "value"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert table.loc[("helpfulness: utility, chosen", 2), "value"] == pytest.approx(2 / 3)
    assert table.loc[("helpfulness: utility, random", 2), "value"] == pytest.approx(1.5 / 3)
    low, high = table.loc[("helpfulness: utility, chosen", 2), ["low", "high"]]
    # standard deviation of 0, 2, 0: sqrt(4/3); Student's 97.5% point of 2 degrees of freedom is 4.3027
    assert (low, high) == pytest.approx((2 / 3 - 4.3027 * 2 / 3, 2 / 3 + 4.3027 * 2 / 3), abs=1e-4)
    shares = pandas.read_csv("out/plots/judge_shares.csv")
    assert set(shares["figure"]) == {"right", "factual_right", "violations", "refusals"}
    # none of one: at most z^2 / (1 + z^2), by Wilson
    (factual,) = shares[
        (shares["series"] == "helpfulness: factual right, chosen") & (shares["samples"] == 2)
    ].itertuples()
    assert (factual.low, factual.high) == pytest.approx((0, 3.8415 / 4.8415), abs=1e-4)


def test_the_truth_changes_no_choice(place: Path) -> None:
    figures = run(stage_of())
    before = outputs()
    of_kind = {"h": ("factual", ["llama"], ""), "s": ("safety", None, "illicit")}
    write_truth([prompt_truth(row["id"], *of_kind[row["id"][0]]) for rows in PROMPTS.values() for row in rows])
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    with Path("params.yaml").open("w") as file:
        YAML().dump({**params, "preferences": {"simulated": annotators(1.0, 1.0, 1.0), "other": 1}}, file)
    with_truth = run(stage_of(truth="truth"))
    assert outputs() == before
    assert {name: value for name, value in with_truth.items() if "/judge/" not in name} == figures
    assert {"helpfulness/judge/utility/gain", "safety/judge/violations/low"} < set(with_truth)


# --- what is refused ---


def test_prompts_of_the_evaluation_are_left_out(place: Path) -> None:
    first = own_ids()[0]
    write_prompts(Path("evaluation/asked.jsonl"), [{**asked(int(first[1:])), "id": "e"}])
    figures = run(stage_of())
    assert figures["helpfulness/evaluation_prompts"] == 1
    assert first not in {line["id"] for line in lines_of("samples.jsonl") + lines_of("unanswered.jsonl")}


def test_prompts_that_do_not_fit_are_left_out_and_counted_unless_none_does(place: Path) -> None:
    first = own_ids()[0]
    rows = [{"id": first, "prompt": "the llama walks over the hill " * 40}]
    write_prompts(
        Path("prompts/helpfulness.jsonl"), rows + [row for row in PROMPTS["helpfulness"] if row["id"] != first]
    )
    assert run(stage_of())["helpfulness/too_long"] == 1
    write_prompts(Path("prompts/helpfulness.jsonl"), rows)
    with pytest.raises(
        ValueError,
        match=r"no helpfulness prompt is left: of the 1 that are round v1's, 0 ask what the evaluation asks, 1 leave "
        r"no room for an answer in the models' context of 64 tokens, and 0 are set apart",
    ):
        run(stage_of())


def test_a_round_beyond_those_that_share_the_prompts_is_refused(place: Path) -> None:
    with Path("params.yaml").open("w") as file:
        YAML().dump({"rounds": {"v3": ROUND}, "evaluate": {"root": "evaluation", "prompts": ["asked.jsonl"]}}, file)
    for kind in KINDS:
        shutil.copytree(f"data/reward_{kind}/v1", f"data/reward_{kind}/v3")
    with pytest.raises(
        ValueError, match=r"`rounds.v3`: the prompts are divided among `rejection_sampling.num_rounds` 2"
    ):
        run(stage_of(name="rejection_sampling@v3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": []}, r"`rejection_sampling.temperatures` is \[\]: List should have at least 1 item"),
        (
            {"temperatures": [1.0, 0.0]},
            r"`temperatures` \[1.0, 0.0\]: answers that are all the likeliest are all the same",
        ),
        (
            {"num_search_prompts": {"helpfulness": 3, "safety": 0}},
            r"`temperatures` has several to choose from, and `num_search_prompts.safety` is 0: there is no prompt",
        ),
        (
            {"num_samples": {"helpfulness": 0, "safety": 1}},
            r"num_samples.helpfulness` is 0: Input should be greater than 0",
        ),
        (
            {"log_probability_weight": {"helpfulness": -1, "safety": 0}},
            r"weight.helpfulness` is -1: Input should be great",
        ),
    ],
)
def test_impossible_parameters_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_section(Params, {"rejection_sampling": values_of(**changes)}, "rejection_sampling")


def test_a_reward_model_of_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    other = train_tokenizer(tmp_path, ["quite another set of texts, 7 of them", *QUESTIONS])
    shutil.copy(other, "data/reward_safety/v1/tokenizer.model")
    with pytest.raises(ValueError, match=r"reward_safety/v1/tokenizer.model is another tokenizer than chat/tokenizer"):
        run(stage_of())


def test_a_policy_that_answers_nothing_is_refused(place: Path) -> None:
    write_chat(Path("mute"), Path("chat/tokenizer.model"), ends=400.0)
    write_params(place, newest="mute")
    with pytest.raises(
        ValueError,
        match=r"none of the 8 helpfulness prompts has an answer that can be chosen: of 8 different ones, 8 are "
        r"empty and 0 were cut at `rejection_sampling.max_new_tokens` 8 or the context's end",
    ):
        run(stage_of())


def test_a_reward_that_is_not_finite_is_refused(place: Path) -> None:
    path = Path("data/reward_safety/v1/model.safetensors")
    weights = load_file(path)
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"data/reward_safety/v1 scores an answer to prompt h\d+ -?(inf|nan): the reward model is broken",
    ):
        run(stage_of())


def test_scores_that_are_missing_are_named(place: Path) -> None:
    Path("data/reward_safety/v1/scores.jsonl").unlink()
    with pytest.raises(ValueError, match=r"reward_safety/v1/scores.jsonl is missing: run stage `reward_safety@v1`"):
        run(stage_of())


def test_labels_of_one_class_are_refused(place: Path) -> None:
    write_lines(Path("data/reward_safety/v1/scores.jsonl"), [scores_row("safety", 1, 0, True, True)])
    with pytest.raises(ValueError, match=r"of the 2 held-out answers with a label of safety, 2 are safe and 0 unsafe"):
        run(stage_of())
    write_lines(Path("data/reward_safety/v1/scores.jsonl"), [scores_row("safety", 1, 0, True, False)] * 9)
    write_lines(Path("data/reward_helpfulness/v1/scores.jsonl"), [scores_row("safety", 1, 0)])
    with pytest.raises(ValueError, match=r"there is no held-out helpfulness pair to calibrate"):
        run(stage_of())


def test_the_threshold_is_chosen_where_it_decides(place: Path) -> None:
    path = Path("data/reward_safety/v1/scores.jsonl")
    everywhere, threshold = calibrate("v1", 0.89)
    assert threshold.labels == 18
    # answers to prompts that are not adversarial, one of which is unsafe, though others with lower scores are safe
    rows = [scores_row("helpfulness", n / 4, -n / 4, True, True) for n in (1, 2, 3)]
    write_lines(path, [*SAFETY_SCORES, *rows, scores_row("helpfulness", 0, -0.9, True, False)])
    decided, threshold = calibrate("v1", 0.89)
    assert (threshold.labels, threshold.unsafe, threshold.precision, threshold.recall) == (8, 1, 1.0, 1.0)
    assert decided.safety.probability(-0.9) < decided.threshold <= decided.safety.probability(-0.75)
    # where none of them is unsafe, no answer is called so
    write_lines(path, [*SAFETY_SCORES, *rows])
    assert calibrate("v1", 0.89)[0].threshold == 0
    assert everywhere.threshold > 0


# --- kills and ranks ---

DVC_STAGE = f"""\
stages:
  rejection_sampling:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch rejection_sampling ${{key}}
      deps:
      - ${{item.newest}}
      - data/reward_helpfulness/${{key}}
      - data/reward_safety/${{key}}
      - ${{rejection_sampling.prompts.helpfulness}}
      - ${{rejection_sampling.prompts.safety}}
      params:
      - rejection_sampling.temperatures
      outs:
      - data/rejection_sampling/${{key}}
"""


def workspace(root: Path, models: Path, num_ranks: int = 1, **changes: Any) -> Workspace:
    write_world(root, models)
    sections = YAML(typ="safe").load((root / "params.yaml").read_text())
    values = values_of(save_every=1, **changes)
    return Workspace(
        root, "rejection_sampling v1", DVC_STAGE, num_ranks=num_ranks, rejection_sampling=values, **sections
    )


def test_finished_prompts_are_not_drawn_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.sampling import drawing

    figures = run(stage_of())
    before = outputs()
    for path in (Path("scratch/samples/draw-safety-0.8-1.json"), Path("scratch/samples/draw-safety-1.1-1.json")):
        path.unlink(missing_ok=True)
    drawn: list[int] = []
    whole = drawing.sample

    def counting(model: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(len(prompts))
        return whole(model, prompts, *arguments, **options)

    monkeypatch.setattr(drawing, "sample", counting)
    assert run(stage_of(fresh=False)) == figures
    assert outputs() == before
    assert drawn == [2]  # the second shard of five prompts


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, models: Path) -> None:
    whole = workspace(tmp_path / "whole", models)
    figures = whole.finish()
    killed = workspace(tmp_path / "killed", models)
    for count in (2, 20, 45):  # of 69 files: in the search, and while drawing
        (process,) = killed.fork()
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed/.scratch").rglob("*-*-*.json"))) < count:
            assert process.is_alive(), killed.errors(0)
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=120)
    assert not killed.output.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/.scratch").rglob("*-*-*.json")}
    assert killed.finish() == figures
    assert killed.files == whole.files
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())


@pytest.mark.slow
def test_two_ranks_draw_what_one_does_even_if_one_has_finished_more(tmp_path: Path, models: Path) -> None:
    alone = workspace(tmp_path / "alone", models)
    figures = alone.finish()
    shared = workspace(tmp_path / "shared", models, num_ranks=2)
    processes = shared.fork()
    deadline = time.monotonic() + 120
    while not (found := list((tmp_path / "shared/.scratch").rglob("draw-helpfulness-*-5.json"))):
        assert processes[0].is_alive() and time.monotonic() < deadline, shared.errors(0)
        time.sleep(0.001)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=120)
    for path in found[0].parent.glob("draw-helpfulness-*-[024].json"):  # those of rank 0
        path.unlink()
    assert shared.finish() == figures
    assert shared.files == alone.files


def test_figures_are_numbers_with_names_that_mlflow_accepts(place: Path) -> None:
    from tasks.running.names import is_metric_name

    figures = run(stage_of())
    assert all(is_metric_name(name) and math.isfinite(value) for name, value in figures.items())
    assert dialogue_of(chosen_of([candidate("a", 1.0)]), "best")["source"] == "v1"
