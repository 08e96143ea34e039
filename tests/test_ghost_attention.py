from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import join_alone
from ruamel.yaml import YAML
from stages import Workspace, stage_here
from test_rejection_sampling import QUESTIONS, models  # noqa: F401 - a fixture

from model.network.checkpoint import read_config, read_tokenizer
from model.text.dialogue import encode_dialogue
from tasks.conversing.playing import Drawn, Script, messages_of
from tasks.ghost_attention.__main__ import Params, Told, Turn, parts_of, run
from tasks.ghost_attention.instructions import (
    Instruction,
    Kind,
    Rule,
    draw_rule,
    go_together,
    read_kinds,
    respects,
    shown_in,
    values_in,
)
from tasks.reading.rounds import round_named
from tasks.running.files import read_lines, write_lines

NOTHING = "data/seeds/none"
KIND: dict[str, Any] = {
    "wordings": ["End every answer with {value}."], "terse": ["Last: {value}"], "values": ["my friend"],
    "drawn": None, "about": None, "required": r"\b{value}\W*$", "forbidden": None, "excludes": [],
}  # fmt: skip


def kind(**changes: Any) -> Kind:
    return Kind.model_validate({**KIND, **changes})


# --- instructions ---


@pytest.mark.parametrize(
    ("changes", "value", "answer", "expected"),
    [
        ({}, "my friend", "Yes, my friend.", True),
        ({}, "my friend", "Yes, MY FRIEND", True),
        ({}, "my friend", "My friend, yes.", False),
        ({}, "a.c", "it ends in abc", False),  # a value is no expression
        ({"required": r"^\S+$"}, "", " Clay. ", True),
        ({"required": r"^\S+$"}, "", "Wet clay.", False),
        ({"required": None, "forbidden": "the"}, "", "Der Markt", True),
        ({"required": None, "forbidden": "the"}, "", "The market", False),
        ({"values": ["a", "b"], "required": {"a": "x", "b": "y"}}, "b", "an x", False),
        ({"values": ["a", "b"], "required": {"a": "x", "b": "y"}}, "b", "a y", True),
        ({"required": "I", "forbidden": "assistant"}, "", "I am an assistant", False),
    ],
)
def test_an_answer_is_checked_by_expressions(changes: Any, value: str, answer: str, expected: bool) -> None:
    assert respects({"k": kind(**changes)}, Instruction("k", value, ""), answer) is expected


def test_an_instruction_shows_only_in_answers_to_turns_that_are_about_it() -> None:
    kinds = {"hobby": kind(about=r"\bhobby\b"), "form": kind()}
    rule = Rule([Instruction("hobby", "", ""), Instruction("form", "", "")])
    assert [each.kind for each in shown_in(kinds, rule, "What is your HOBBY?")] == ["hobby", "form"]
    assert [each.kind for each in shown_in(kinds, rule, "Where?")] == ["form"]


def test_kinds_that_exclude_each_other_are_never_combined() -> None:
    kinds = {"a": kind(excludes=["b"]), "b": kind(), "c": kind()}
    assert not go_together(kinds, "a", "b")
    assert not go_together(kinds, "b", "a")  # whichever says so
    assert not go_together(kinds, "a", "a")
    values = {name: own.values for name, own in kinds.items()}
    drawn = [draw_rule(kinds, values, "a", 1.0, 0.5, random.Random(seed)) for seed in range(30)]
    assert {tuple(each.kind for each in rule.instructions) for rule in drawn} == {("a", "c")}
    alone = {"a": kind(excludes=["b"]), "b": kind()}  # contradictions leave one
    assert len(draw_rule(alone, values, "a", 1.0, 0.5, random.Random(0)).instructions) == 1


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_a_rule_has_its_first_kind_and_all_its_words(seed: int, combined: float, terse: float) -> None:
    kinds = {"a": kind(), "b": kind(values=["dear guest", "Sir"], terse=[])}
    values = {name: own.values for name, own in kinds.items()}
    rule = draw_rule(kinds, values, "b", combined, terse, random.Random(seed))
    assert rule.instructions[0].kind == "b"
    assert len(rule.instructions) <= 2
    assert all(each.value in kinds[each.kind].values and each.value in rule.text for each in rule.instructions)
    assert "{" not in rule.text
    assert all(each.text.startswith("End every") for each in rule.instructions if each.kind == "b" or terse == 0)


def test_half_of_the_instructions_are_terse() -> None:
    kinds = {"a": kind()}
    texts = [draw_rule(kinds, {"a": ["x"]}, "a", 0, 0.5, random.Random(seed)).text for seed in range(400)]
    assert set(texts) == {"End every answer with x.", "Last: x"}
    assert abs(texts.count("Last: x") - 200) < 60  # six deviations


def test_values_are_those_that_the_model_gave_often_enough() -> None:
    asked = kind(drawn={"system": "", "user": "?", "pattern": r"like (\w+)"})
    answers = ["I like tea.", "We like cake.", "I like tea.", "Tea.", "I like cake and like tea.", "I like it."]
    assert values_in(asked, answers, 2) == ["cake", "tea"]
    assert values_in(asked, answers, 1) == ["cake", "tea", "it"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"required": None},
            r"instruction `k`: no check knows it: write what an answer must have \(`required`\) or not",
        ),
        ({"wordings": [], "terse": []}, "instruction `k`: it has neither `wordings` nor `terse` ones: write how it is"),
        ({"values": []}, "instruction `k`, `values`: List should have at least 1 item"),
        ({"required": {"x": "y"}}, "instruction `k`: its expressions leave out the value 'my friend': add one for it"),
        ({"required": "("}, r"instruction `k`: '\(' is no regular expression: "),
        (
            {"drawn": {"system": "", "user": "?", "pattern": "like"}},
            r"instruction `k`: `drawn.pattern` needs one group, the value: 'like'",
        ),
        (
            {"drawn": {"system": "", "user": "?", "pattern": "(a)"}, "required": {"my friend": "x"}},
            r"instruction `k`: its expressions are by value, and `drawn` would give others: write one for all",
        ),
        ({"about": "["}, r"instruction `k`: '\[' is no regular expression: "),
        ({"excludes": ["z"]}, r"instruction `k` excludes `z`, which is not there: \['k'\]"),
        ({"often": True}, "instruction `k`, `often`: Extra inputs are not permitted"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    path = tmp_path / "kinds.json"
    path.write_text(json.dumps({"k": {**KIND, **changes}}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: {message}"):
        read_kinds(path, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is missing: correct `x`, or run the stage"), ("{", "is not JSON"), ("{}", "holds no kind of instruction")],
)
def test_a_file_without_instructions_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "kinds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_kinds(path, "x")


# --- what is learnt ---


def params_of(**changes: Any) -> Params:
    values = {
        "rounds": {"v1": {"newest": "chat", "earlier": NOTHING}}, "root": "dialogues",
        "sources": {"own": {"files": ["own.jsonl"], "format": "auto"}}, "max_malformed_share": 0.1,
        "instructions": "kinds.json", "num_dialogues": 4, "combined_share": 0.0, "terse_share": 0.5, "num_drawn": 0,
        "min_draws": 1, "min_values": 1, "num_earlier_turns": 0, "num_samples": 8, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "max_new_tokens": 8, "max_parts": 2, "precision": "fp32", "max_rows": 4,
    }  # fmt: skip
    return Params.model_validate({**values, **changes})


def test_the_instruction_is_in_the_first_message_alone_and_only_the_last_answer_is_learnt(models: Path) -> None:  # noqa: F811
    config = read_config(models / "chat")
    tokenizer = read_tokenizer(models / "chat", config)
    rule = Rule([Instruction("k", "", "the hill")])
    told = Told("d", rule, ["who walks?", "a llama?", "where?"])
    turns = [
        Turn(number, Drawn(text, finished=True), {"k": True})
        for number, text in enumerate(["the llama", "over the hill", "a hill"], start=1)
    ]
    place = round_named_here()
    (line,) = parts_of(params_of(max_parts=1), place, told, [turns[0], turns[1]], seed=1)
    assert line["messages"] == [
        {"role": "system", "content": "the hill"},
        {"role": "user", "content": "who walks?"},
        {"role": "assistant", "content": "the llama"},
        {"role": "user", "content": "a llama?"},
        {"role": "assistant", "content": "over the hill"},
    ]
    encoded = encode_dialogue(line["messages"], tokenizer, "last")
    learnt = [token for token, is_learnt in zip(encoded.ids, encoded.is_learnt, strict=True) if is_learnt]
    assert learnt[-1] == tokenizer.eos_id
    assert tokenizer.decode(learnt[:-1]).strip() == "over the hill"
    assert encoded.ids[-len(learnt) :] == learnt  # in one piece at the end
    assert tokenizer.decode(encoded.ids).count("the hill") == 2  # the instruction once, and the answer


def round_named_here() -> Any:
    from tasks.reading.rounds import Place, Round

    own = Round(
        newest="chat", earlier="e", batches="b", samples=NOTHING, distil_from=NOTHING, ghost_attention=NOTHING,
        context_distillation=NOTHING,
    )  # fmt: skip
    return Place("v1", 0, own)


def test_parts_end_with_answers_that_hold_after_the_first_turn() -> None:
    held = {1: True, 2: False, 3: True, 4: True, 5: None, 6: True}
    turns = [
        Turn(number, Drawn(f"a{number}", finished=number != 6), {} if own is None else {"k": own})
        for number, own in held.items()
    ]
    told = Told("d", Rule([Instruction("k", "", "Do.")]), [f"u{number}" for number in held])
    lines = parts_of(params_of(max_parts=9), round_named_here(), told, turns, seed=1)
    assert [line["messages"][-1]["content"] for line in lines] == ["a3", "a4"]  # 6 was cut, 5 shows nothing
    assert [len(line["messages"]) for line in lines] == [1 + 2 * 3, 1 + 2 * 4]
    assert len({line["id"] for line in lines}) == 2
    assert len(parts_of(params_of(max_parts=1), round_named_here(), told, turns, seed=1)) == 1


def test_messages_up_to_a_turn() -> None:
    script = Script("s", "", ["u1", "u2", "u3"])
    answers = [Drawn("a1", True), Drawn("a2", True)]
    assert [message["content"] for message in messages_of(script, answers, 1)] == ["u1", "a1", "u2"]
    assert [message["content"] for message in messages_of(script, answers, 2, 1)] == ["u2", "a2", "u3"]
    assert [message["content"] for message in messages_of(script, answers, 2, 0)] == ["u3"]
    assert len(messages_of(script, answers, 2, 9)) == 5
    assert messages_of(script._replace(system="S"), answers, 0) == [
        {"role": "system", "content": "S"}, {"role": "user", "content": "u1"},
    ]  # fmt: skip


def test_all_distances_from_the_instruction_are_drawn_alike() -> None:
    counts = dict.fromkeys((2, 3, 6), 0)
    for number in range(3000):
        told = Told(f"d{number}", Rule([Instruction("k", "", "Do.")]), ["u"] * 6)
        turns = [Turn(turn, Drawn("a", finished=True), {"k": turn in counts}) for turn in range(1, 7)]
        (line,) = parts_of(params_of(max_parts=1), round_named_here(), told, turns, seed=1)
        counts[sum(message["role"] == "user" for message in line["messages"])] += 1
    assert all(abs(count - 1000) < 130 for count in counts.values())  # five deviations


# --- a whole run ---


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    join_alone()
    shutil.copytree(models / "chat", "chat")
    config = json.loads(Path("chat/config.json").read_text())
    Path("chat/config.json").write_text(json.dumps({**config, "max_position_embeddings": 160}))
    own = {"earlier": "e", "batches": "b", "samples": NOTHING, "distil_from": NOTHING, "context_distillation": NOTHING}
    rounds = {"v1": {"newest": "chat", "ghost_attention": "data/ghost_attention/v1", **own}}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"rounds": rounds}, file)
    Path("dialogues").mkdir()
    write_dialogues([3, 2, 1])
    own = {"wordings": ["a {value}"], "terse": ["the {value}"], "values": ["hill"], "required": "."}
    Path("kinds.json").write_text(json.dumps({"k": {**KIND, **own}}))
    return tmp_path


def write_dialogues(lengths: list[int], said: str = "a?") -> None:
    lines = []
    for number, length in enumerate(lengths):
        messages: list[dict[str, str]] = []
        for _ in range(length):
            messages += [
                {"role": "user", "content": said},
                {"role": "assistant", "content": "no"},
            ]
        lines.append({"id": f"d{number}", "messages": messages})
    write_lines(Path("dialogues/own.jsonl"), lines)


def test_what_the_user_says_is_answered_under_the_instruction_and_joins_earlier_rounds(place: Path) -> None:
    Path("earlier").mkdir()
    write_lines(Path("earlier/dialogues.jsonl"), [{"id": "before", "messages": []}])
    assert round_named("v1").name == "v1"
    figures = run(stage_here("ghost_attention@v1", params_of(rounds={"v1": {"newest": "chat", "earlier": "earlier"}})))
    lines = read_lines(Path("out/dialogues.jsonl"))
    played = read_lines(Path("out/played.jsonl"))
    assert lines[0]["id"] == "before"
    assert figures["too_short"] == 1
    assert figures["played"] == 2 == len(played)
    assert figures["dialogues"] == len(lines) == 1 + figures["dialogues"] - figures["dialogues_earlier"]
    for line in lines[1:]:
        system, *messages = line["messages"]
        assert system["content"] in ("a hill", "the hill")
        assert not any(system["content"] in message["content"] for message in messages)
    bytes_of = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    for saved in sorted(Path("scratch/turns").iterdir())[1:]:
        saved.unlink()  # stopped after the first turn
    run(
        stage_here(
            "ghost_attention@v1", params_of(rounds={"v1": {"newest": "chat", "earlier": "earlier"}}), fresh=False
        )
    )
    assert {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == bytes_of


def test_the_model_is_asked_for_values_and_the_file_has_them_where_it_gives_too_few(place: Path) -> None:
    own = {"wordings": ["a {value}"], "terse": [], "values": ["hill"], "required": "."}
    drawn = {"system": "", "user": "a?", "pattern": r"(\w)"}
    Path("kinds.json").write_text(json.dumps({"k": {**KIND, **own, "drawn": drawn}}))
    asked = {"num_drawn": 200, "min_draws": 1}
    figures = run(stage_here("ghost_attention@v1", params_of(**asked, min_values=1)))
    assert figures["values_drawn"] > 0
    given = {line["instruction"] for line in read_lines(Path("out/played.jsonl"))}
    assert "a hill" not in given
    assert all(re.fullmatch(r"a \w", text) for text in given)
    run(stage_here("ghost_attention@v1", params_of(**asked, min_values=99)))
    assert {line["instruction"] for line in read_lines(Path("out/played.jsonl"))} == {"a hill"}


def test_parts_that_are_longer_than_the_context_are_counted_and_left_out(place: Path) -> None:
    write_dialogues([12, 12])
    figures = run(stage_here("ghost_attention@v1", params_of(max_parts=9)))
    assert figures["too_long"] > 0
    config = read_config(Path("chat"))
    tokenizer = read_tokenizer(Path("chat"), config)
    lengths = [
        len(encode_dialogue(line["messages"], tokenizer).ids) for line in read_lines(Path("out/dialogues.jsonl"))
    ]
    assert lengths
    assert max(lengths) <= config.max_position_embeddings


def test_a_dialogue_that_outgrows_the_context_ends_earlier_and_is_counted(place: Path) -> None:
    write_dialogues([12, 12])
    figures = run(stage_here("ghost_attention@v1", params_of(num_earlier_turns=None, num_samples=30)))
    assert figures["cut_short"] == 2  # twelve turns, with the instruction in each, are too long for 160 tokens
    assert {len(line["turns"]) for line in read_lines(Path("out/played.jsonl"))} <= set(range(3, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": {}}, r"`ghost_attention.rounds` has no `v1`: it has none"),
        (
            {"rounds": {"v1": {"newest": "chat", "earlier": "data/none"}}},
            r"data/none/dialogues.jsonl is missing, though `ghost_attention.rounds.v1.earlier` names its directory",
        ),
        ({"instructions": "no.json"}, r"no.json is missing: correct `ghost_attention.instructions`"),
    ],
)
def test_what_is_missing_is_refused(place: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage_here("ghost_attention@v1", params_of(**changes)))


def test_instructions_that_all_contradict_each_other_are_not_combined(place: Path) -> None:
    Path("kinds.json").write_text(json.dumps({"a": {**KIND, "excludes": ["b"]}, "b": KIND}))
    with pytest.raises(
        ValueError, match=r"`ghost_attention.combined_share` is 0.5, but all kinds of instruction in kin"
    ):
        run(stage_here("ghost_attention@v1", params_of(combined_share=0.5)))


def test_dialogues_that_are_all_too_long_to_learn_are_refused(place: Path) -> None:
    write_dialogues([2, 2], "a llama? " * 6)
    message = (
        r"all 2 parts of dialogues that respect their instruction are longer than the context of 160 tokens: bring"
    )
    with pytest.raises(ValueError, match=message):
        run(stage_here("ghost_attention@v1", params_of()))


def test_dialogues_of_one_turn_alone_are_refused(place: Path) -> None:
    write_dialogues([1, 1])
    with pytest.raises(ValueError, match=r"none of the 2 dialogues in `ghost_attention.sources` has two turns of the"):
        run(stage_here("ghost_attention@v1", params_of()))


def test_a_model_that_never_follows_is_refused(place: Path) -> None:
    Path("kinds.json").write_text(json.dumps({"k": {**KIND, "required": "impossible"}}))
    with pytest.raises(
        ValueError, match=r"no answer of chat respects its instruction, in 2 dialogues with 8 samples a"
    ):
        run(stage_here("ghost_attention@v1", params_of()))


# --- a stopped run, and two ranks ---

DVC_STAGE = """\
stages:
  ghost_attention:
    foreach: {v1: v1}
    do:
      cmd: exec python -m tasks.workers.launch ghost_attention ${key}
      deps: [chat, dialogues, kinds.json]
      params: [seed, ghost_attention]
      outs: ["data/ghost_attention/${key}"]
"""


def workspace(root: Path, place: Path, num_ranks: int = 1) -> Workspace:
    for name in ("chat", "dialogues"):
        shutil.copytree(place / name, root / name)
    shutil.copy(place / "kinds.json", root / "kinds.json")
    sections = YAML(typ="safe").load((place / "params.yaml").read_text())
    sections["ghost_attention"] = params_of(num_dialogues=3).model_dump()
    return Workspace(root, "ghost_attention v1", DVC_STAGE, num_ranks=num_ranks, **sections)


@pytest.mark.slow
def test_killed_or_on_two_ranks_it_ends_in_the_same_bytes(place: Path) -> None:
    write_dialogues([4, 4, 4])
    whole = workspace(place / "whole", place)
    figures = whole.finish()
    killed = workspace(place / "killed", place)
    (process,) = killed.fork()
    while not list((place / "killed/.scratch").rglob("1-0-1.json")):
        assert process.is_alive(), killed.errors(0)
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(timeout=120)
    assert killed.finish() == figures
    assert killed.files == whole.files
    shared = workspace(place / "shared", place, num_ranks=2)
    assert shared.finish() == figures
    assert shared.files == whole.files
