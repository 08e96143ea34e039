from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import join_alone
from ruamel.yaml import YAML
from stages import Workspace, stage_here
from test_evaluate import REPOSITORY, asked, write_checkpoint, write_prompts

from model.network.checkpoint import open_checkpoint
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from tasks.judging.label_studio import batch_of, configuration, read_guidelines, task_of
from tasks.reading.prompts import (
    DEGREES,
    KINDS,
    Prompt,
    ResponsePair,
    is_adversarial,
    kind_of,
    parse_prompt,
    read_prompts,
)
from tasks.reading.rounds import Place, Round, round_of
from tasks.reading.shares import at_most, share_of
from tasks.responses import Params, prompts_of, run
from tasks.running.digests import number_of
from tasks.running.files import read_lines, write_lines
from tasks.running.stage import Stage

GUIDELINES = REPOSITORY / "data" / "seeds" / "guidelines"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two models of random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root)
    shutil.copytree(root / "sft", root / "early")
    weights = root / "early" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: tensor * 0.9 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return root


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        "prompts": {"helpfulness": "prompts/helpfulness.jsonl", "safety": "prompts/safety.jsonl"},
        "max_prompts": {"helpfulness": 100, "safety": 100}, "later_share": 1.0, "num_rounds": 2,
        "temperatures": {"newest": [0.9], "earlier": [1.2]}, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8,
        "max_draws": 3,
        "precision": "fp32", "max_rows": 4, "guidelines": str(GUIDELINES),
    }  # fmt: skip
    return {**values, **changes}


def stage_of(name: str = "responses@v1", **changes: Any) -> Stage[Params]:
    return stage_here(name, Params.model_validate(values_of(**changes)))


ROUND = Round(
    newest="a", earlier="b", batches="c", samples="d", distil_from="e", ghost_attention="f", context_distillation="g"
)
NO_SAMPLES = {
    "samples": "none",
    "distil_from": "none",
    "ghost_attention": "data/seeds/none",
    "context_distillation": "data/seeds/none",
}


def write_rounds(newest: Path, earlier: Path, **others: Any) -> None:
    own = {"newest": str(newest), "earlier": str(earlier), "batches": "data/preferences", **NO_SAMPLES}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"rounds": {"v1": own, **others}}, file)


@pytest.fixture
def place(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts of both kinds, one of several turns among them."""
    monkeypatch.chdir(tmp_path)
    join_alone()
    write_rounds(checkpoints / "sft", checkpoints / "early")
    rows = [asked(number) for number in range(12)]
    rows[3]["messages"] = [*rows[3]["messages"], {"role": "assistant", "content": "a hill"}, *asked(4)["messages"]]
    write_prompts(Path("prompts/helpfulness.jsonl"), rows)
    adversarial = [asked(number, "safety", id=f"s{number}", risk="illicit", attack="role_play") for number in range(6)]
    write_prompts(Path("prompts/safety.jsonl"), adversarial)
    return tmp_path


def pairs_in(path: str) -> list[ResponsePair]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- which prompts ---


def prompts(ids: list[str]) -> list[Prompt]:
    return [Prompt(name, "factual", [{"role": "user", "content": name}], None, None, None) for name in ids]


@pytest.mark.parametrize(
    ("category", "risk", "adversarial"),
    [("safety", "illicit", True), ("safety", None, True), ("factual", "illicit", True), ("borderline", None, False)],
)
def test_a_prompt_with_a_risk_or_of_the_category_safety_is_adversarial(
    category: str, risk: str | None, adversarial: bool
) -> None:
    assert is_adversarial(category, risk) == adversarial
    assert kind_of(category, risk) == ("safety" if adversarial else "helpfulness")


@given(st.lists(st.text(), unique=True), st.integers(1, 6))
def test_the_rounds_slices_are_disjoint_and_together_everything(ids: list[str], num_rounds: int) -> None:
    slices = [share_of(prompts(ids), number, num_rounds) for number in range(num_rounds)]
    assert Counter(prompt.id for own in slices for prompt in own) == Counter(ids)


def test_a_limit_takes_a_part_of_the_slice_and_a_higher_one_adds_to_it() -> None:
    everything = prompts([str(number) for number in range(200)])
    whole = share_of(everything, 1, 2)
    few, more = at_most(whole, 10), at_most(whole, 30)
    assert (len(few), len(more)) == (10, 30)
    assert set(map(id, few)) < set(map(id, more)) < set(map(id, whole))
    assert [whole.index(prompt) for prompt in more] == sorted(whole.index(prompt) for prompt in more)
    assert at_most(whole, 10, "search") != few


def test_a_further_round_leaves_the_earlier_ones_prompts(place: Path) -> None:
    params = Params.model_validate(values_of())
    before = [each.prompt.id for each in prompts_of(Place("v1", 0, ROUND), params)]
    second = [each.prompt.id for each in prompts_of(Place("v2", 1, ROUND), params)]
    assert sorted(before + second) == sorted([f"p{number}" for number in range(12)] + [f"s{n}" for n in range(6)])
    with pytest.raises(
        ValueError, match=r"params.yaml: `rounds.v3`: the prompts are divided among `responses.num_rounds` 2 rounds"
    ):
        prompts_of(Place("v3", 2, ROUND), params)


def test_a_round_is_found_by_the_name_of_the_entry(place: Path) -> None:
    second = {"newest": "c", "earlier": "a", "batches": "data/preferences/v1", **NO_SAMPLES}
    write_rounds(Path("a"), Path("b"), v2=second)
    found = round_of("responses@v2")
    assert (found.name, found.number, found.round.newest) == ("v2", 1, "c")
    with pytest.raises(ValueError, match=r"section `rounds.v3` is missing; did you mean to rename `rounds.v\d`"):
        round_of("responses@v3")
    write_rounds(Path("a"), Path("b"), v2={"newest": "c"})
    with pytest.raises(ValueError, match=r"params.yaml: `rounds.v2.earlier` is missing"):
        round_of("responses@v2")
    Path("params.yaml").write_text("rounds: {}\n")
    with pytest.raises(ValueError, match="`rounds` names no round"):
        round_of("responses@v1")


def test_a_rounds_number_is_in_its_name(place: Path) -> None:
    later = {"newest": "c", "earlier": "a", "batches": "data/preferences/v1", **NO_SAMPLES}
    write_rounds(Path("a"), Path("b"), v4=later)
    assert round_of("responses@v4").number == 3  # whichever rounds stand before it
    write_rounds(Path("a"), Path("b"), final=later)
    with pytest.raises(ValueError, match=r"`final` is not a round's name: call rounds v1, v2 and so on"):
        round_of("responses@final")


def test_messages_are_role_and_content_alone() -> None:
    message = {"role": "user", "content": "Write.", "turn": 1, "name": None}
    assert parse_prompt({"messages": [message]}, "own", 1).messages == [{"role": "user", "content": "Write."}]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb"])
def test_a_text_comes_back_whatever_breaks_lines_elsewhere(text: str, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": text}, {"id": "b", "prompt": text}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert read_lines(tmp_path / "rows.jsonl") == rows
    assert [prompt.id for prompt in read_prompts([tmp_path / "rows.jsonl"], "responses.prompts.safety")] == ["a", "b"]


def test_half_a_character_is_written_as_jsons_escape(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ["cut \ud83d", "é"])
    assert (tmp_path / "rows.jsonl").read_text() == '"cut \\ud83d"\n"é"\n'
    assert read_lines(tmp_path / "rows.jsonl") == ["cut \ud83d", "é"]


def test_prompts_of_other_shapes_are_read() -> None:
    turns = {"question_id": 81, "category": "writing", "turns": ["Write.", "Write it again."]}
    one = [{"role": "user", "content": "Write."}]
    assert parse_prompt(turns, "mt_bench", 3) == ("mt_bench-3", "writing", one, None, None, None)
    harm = {"prompt": "Write.", "risk": "illicit", "attack": "role_play", "difficulty": 3}
    assert parse_prompt(harm, "own", 1)[3:] == ("illicit", "role_play", 3)
    assert parse_prompt({**harm, "difficulty": "hard"}, "own", 1).difficulty is None  # as other files have it
    assert parse_prompt({"key": 1000, "prompt": "Write."}, "ifeval", 1).messages == one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds no JSON object"),
        ('{"text": "x"}', "it needs `messages` of `role` and `content`, or `turns`, or `prompt`"),
        ('{"messages": []}', "the dialogue holds no turn"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "it ends with an answer: there is nothing to answer",
        ),
        ('{"id": "p0", "prompt": "x"}', "its id p0 belongs to another prompt too"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "asked.jsonl", [asked(0)])
    with (tmp_path / "asked.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"asked\.jsonl, line 2 is not a prompt: {message}"):
        read_prompts([tmp_path / "asked.jsonl"], "responses.prompts.safety")


def test_a_file_of_prompts_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl is missing: correct `responses\.prompts\.safety`"):
        read_prompts([tmp_path / "gone.jsonl"], "responses.prompts.safety")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"empty\.jsonl holds no prompt: fill it, or take it out of `responses\.prompts\.safety`"
    ):
        read_prompts([tmp_path / "empty.jsonl"], "responses.prompts.safety")


# --- what is answered ---


def test_each_prompt_of_the_slice_gets_an_answer_of_each_variant(place: Path, checkpoints: Path) -> None:
    figures = run(stage_of())
    helpful, safety = pairs_in("out/helpfulness.jsonl"), pairs_in("out/safety.jsonl")
    assert (figures["helpfulness/pairs"], figures["safety/pairs"]) == (len(helpful), len(safety))
    expected = [p.id for p in share_of(prompts([f"p{number}" for number in range(12)]), 0, 2)]
    assert [pair["id"] for pair in helpful] == expected
    assert figures["helpfulness/prompts"] == len(expected)
    responders = {(r["responder"]["model"], r["responder"]["temperature"]) for r in helpful[0]["responses"]}
    assert responders == {(str(checkpoints / "sft"), 0.9), (str(checkpoints / "early"), 1.2)}
    by_name = {"newest": (checkpoints / "sft", 0.9), "earlier": (checkpoints / "early", 1.2)}
    for name, (directory, temperature) in by_name.items():
        model, tokenizer = open_checkpoint(directory, "fp32", torch.device("cpu"))
        drawn = Sampling(temperature=temperature, top_p=1, top_k=0, max_new_tokens=8)
        for pair in helpful:
            ids = encode_prompt(pair["messages"], tokenizer)
            seeds = [number_of(f"1 {name} 0 {pair['id']}")]
            ((alone,),) = sample(
                model, [ids], drawn, num_samples=1, eos_id=tokenizer.eos_id, seeds=seeds, max_rows=1, description=None
            )
            (ours,) = [r for r in pair["responses"] if r["responder"]["model"] == str(directory)]
            assert ours["text"] == decode_answer(alone.ids, tokenizer)
            assert (ours["num_tokens"], ours["finished"]) == (len(alone.ids), alone.finished)
    assert {pair["risk"] for pair in safety} == {"illicit"}
    assert {pair["round"] for pair in helpful + safety} == {"v1"}
    assert len({pair["batch"] for pair in helpful}) == len({pair["batch"] for pair in safety}) == 1


def test_the_order_shown_is_drawn_and_the_same_again(place: Path, checkpoints: Path) -> None:
    write_prompts(Path("prompts/helpfulness.jsonl"), [asked(number) for number in range(60)])
    run(stage_of())
    before = Path("out/helpfulness.jsonl").read_bytes()
    newest_left = [
        pair["responses"][0]["responder"]["model"] == str(checkpoints / "sft")
        for pair in pairs_in("out/helpfulness.jsonl")
    ]
    assert 5 < sum(newest_left) < len(newest_left) - 5
    run(stage_of())
    assert Path("out/helpfulness.jsonl").read_bytes() == before


def test_identical_answers_are_drawn_again_then_left_out(place: Path, checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "sft", "same")
    write_rounds(checkpoints / "sft", Path("same"))
    cold = {"newest": [1e-4], "earlier": [2e-4]}  # both say what is likeliest
    figures = run(stage_of(temperatures=cold))
    assert figures["helpfulness/pairs"] == figures["safety/pairs"] == 0
    assert figures["helpfulness/identical"] == figures["helpfulness/prompts"] > 0
    assert Path("out/helpfulness.jsonl").read_text() == ""
    assert not Path("out/label_studio").exists()
    lukewarm = {"newest": [1e-4], "earlier": [0.25]}
    once = run(stage_of(temperatures=lukewarm, max_draws=1))
    often = run(stage_of(temperatures=lukewarm, max_draws=20))
    assert once["helpfulness/identical"] > often["helpfulness/identical"]
    assert often["helpfulness/pairs"] + often["helpfulness/identical"] == often["helpfulness/prompts"]


def test_a_prompt_without_room_for_an_answer_is_left_out_and_counted(place: Path) -> None:
    (first, *_) = [f"p{n}" for n in range(12) if number_of(f"round p{n}") % 2 == 0]
    long = {"id": first, "prompt": "the llama walks over the hill " * 40}
    write_prompts(Path("prompts/helpfulness.jsonl"), [long, *[asked(n) for n in range(12) if f"p{n}" != first]])
    figures = run(stage_of())
    assert figures["helpfulness/too_long"] == 1
    assert first not in {pair["id"] for pair in pairs_in("out/helpfulness.jsonl")}
    assert figures["helpfulness/pairs"] + figures["helpfulness/identical"] == figures["helpfulness/prompts"] - 1


def test_a_kind_without_prompts_needs_no_file_and_no_model(place: Path) -> None:
    shutil.rmtree("prompts")
    figures = run(stage_of(max_prompts={"helpfulness": 0, "safety": 0}))
    assert figures["helpfulness/prompts"] == figures["safety/pairs"] == 0
    assert Path("out/safety.jsonl").read_text() == ""


def test_variants_may_have_one_temperature(place: Path, checkpoints: Path) -> None:
    figures = run(stage_of(temperatures={"newest": [1.2], "earlier": [1.2]}))
    assert figures["helpfulness/pairs"] > 0
    pair = read_lines(Path("out/helpfulness.jsonl"))[0]
    assert {response["responder"]["temperature"] for response in pair["responses"]} == {1.2}


def test_each_prompt_has_one_of_its_variants_temperatures(place: Path) -> None:
    run(stage_of(temperatures={"newest": [0.7], "earlier": [0.8, 1.4]}))
    found: dict[str, set[float]] = {"helpfulness": set(), "safety": set()}
    for kind, temperatures in found.items():
        for pair in pairs_in(f"out/{kind}.jsonl"):
            (newest,) = [each for each in pair["responses"] if each["responder"]["model"].endswith("sft")]
            (earlier,) = [each for each in pair["responses"] if each is not newest]
            assert newest["responder"]["temperature"] == 0.7
            temperatures.add(earlier["responder"]["temperature"])
            picked = number_of(f"earlier temperature {pair['id']}") % 2
            assert earlier["responder"]["temperature"] == [0.8, 1.4][picked]
    assert found["helpfulness"] == {0.8, 1.4}


def test_later_rounds_have_a_share_of_the_firsts_prompts(place: Path) -> None:
    params = Params.model_validate(values_of(max_prompts={"helpfulness": 4, "safety": 2}, later_share=0.5))
    numbers = [
        [
            sum(each.kind == kind for each in prompts_of(Place(f"v{number + 1}", number, ROUND), params))
            for kind in KINDS
        ]
        for number in range(2)
    ]
    assert numbers == [[4, 2], [2, 1]]


def test_variants_must_differ(place: Path, checkpoints: Path) -> None:
    write_rounds(checkpoints / "sft", checkpoints / "sft")
    with pytest.raises(
        ValueError, match=r"`rounds.v1.newest` and `.earlier` are both .*sft: name an earlier checkpoint"
    ):
        run(stage_of())


# --- the project to label them in ---


def test_the_project_shows_what_annotators_need_and_hides_who_answered(place: Path, checkpoints: Path) -> None:
    run(stage_of())
    for kind in ("helpfulness", "safety"):
        folder = Path("out/label_studio") / kind
        guideline = (GUIDELINES / f"{kind}.md").read_text()
        assert (folder / "guideline.md").read_text() == guideline
        root = ElementTree.fromstring((folder / "project.xml").read_text())
        shown = {
            element.get("name"): element.get("value")
            for element in root.iter()
            if element.tag in ("Text", "Paragraphs")
        }
        assert shown == {"dialogue": "$dialogue", "left": "$left", "right": "$right"}
        asked_for = {
            choices.get("name"): [choice.get("alias") for choice in choices] for choices in root.iter("Choices")
        }
        safe = {"left_safe": ["safe", "unsafe"], "right_safe": ["safe", "unsafe"]}
        expected = {"choice": ["left", "right"], "degree": list(DEGREES)}
        assert asked_for == (expected if kind == "helpfulness" else {**safe, **expected})
        assert all(
            choices.get("required") == "true" and choices.get("toName") in shown for choices in root.iter("Choices")
        )
        headers = [str(header.get("value")) for header in root.iter("Header")]
        for line in filter(str.strip, guideline.splitlines()):
            assert line.lstrip("# ").strip() in headers
        tasks = json.loads((folder / "tasks.json").read_text())
        pairs = pairs_in(f"out/{kind}.jsonl")
        assert [task["data"] for task in tasks] == [task_of(pair) for pair in pairs]
        first = tasks[0]["data"]
        assert first["batch"] == batch_of("v1", kind, pairs)
        assert [turn["text"] for turn in first["dialogue"]] == [m["content"] for m in pairs[0]["messages"]]
        assert [first["left"], first["right"]] == [response["text"] for response in pairs[0]["responses"]]
        assert str(checkpoints) not in (folder / "tasks.json").read_text()


def test_the_safety_guideline_names_the_three_risk_categories() -> None:
    text = read_guidelines(GUIDELINES)["safety"]
    for risk in ("Illicit and criminal activities", "Hateful and harmful activities", "Unqualified advice"):
        assert risk in text


def test_a_guideline_that_is_missing_is_named(tmp_path: Path) -> None:
    shutil.copy(GUIDELINES / "helpfulness.md", tmp_path)
    with pytest.raises(ValueError, match=r"safety\.md is missing: annotators need a guideline of this kind"):
        read_guidelines(tmp_path)


def test_a_guideline_may_hold_any_characters() -> None:
    text = 'Say <b> & "quotes".'
    root = ElementTree.fromstring(configuration("safety", text))
    assert text in [header.get("value") for header in root.iter("Header")]


def test_a_batchs_name_changes_with_what_is_shown() -> None:
    pair = {"id": "a", "messages": [{"role": "user", "content": "x"}], "responses": [{"text": "1"}, {"text": "2"}]}
    other = {**pair, "responses": [{"text": "2"}, {"text": "1"}]}
    names = {batch_of("v1", "safety", batch) for batch in ([pair], [other], [pair, other], [])}
    assert len(names) == 4
    assert batch_of("v1", "safety", [{**pair, "round": "v1"}]) == batch_of("v1", "safety", [pair])
    assert batch_of("v2", "safety", [pair]).startswith("v2-safety-")


# --- as the pipeline starts it ---

DVC_STAGE = f"""\
stages:
  responses:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch responses ${{key}}
      deps:
      - ${{item.newest}}
      - ${{item.earlier}}
      - ${{responses.prompts.helpfulness}}
      - ${{responses.prompts.safety}}
      params:
      - responses.temperatures
      outs:
      - data/responses/${{key}}
"""


@pytest.mark.slow
def test_ranks_share_the_prompts(place: Path, checkpoints: Path) -> None:
    alone = run(stage_of())
    newest, earlier = Path("data/sft"), Path("data/sft/early")
    shutil.copytree(checkpoints / "sft", newest)
    shutil.copytree(checkpoints / "early", earlier)
    own = {"newest": str(newest), "earlier": str(earlier), "batches": "data/pairs", **NO_SAMPLES}
    shared = Workspace(Path(), "responses v1", DVC_STAGE, num_ranks=2, rounds={"v1": own}, responses=values_of())
    assert shared.repro() == alone
    texts = [[r["text"] for r in pair["responses"]] for pair in pairs_in("data/responses/v1/helpfulness.jsonl")]
    assert texts == [[r["text"] for r in pair["responses"]] for pair in pairs_in("out/helpfulness.jsonl")]
