"""Conversations under an instruction: as the world writes them, as a checkpoint plays them, and how they are judged."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from ranks import join_alone
from ruamel.yaml import YAML
from stages import stage_here
from test_rejection_sampling import models  # noqa: F401 - a fixture

from model.inspecting.attention import highest_attention
from model.network.checkpoint import open_checkpoint
from model.network.packing import documents_of
from model.network.transformer import attend, rotary_angles
from tasks import consistency, conversations
from tasks.consistency import Held, gains_of, hits_of, judge_all, shares_of, turns_of
from tasks.conversing.playing import is_answer
from tasks.ghost_attention.instructions import Instruction, read_kinds, respects, shown_in
from tasks.running.files import read_lines, write_lines
from tasks.world.conversations import ABOUT, TYPES, evaluations, seeds_of
from tasks.world.conversations import conversations as draw_conversations
from tasks.world.facts import SEEDS, World, build_world, read_texts
from tasks.world.instructions import NEW, SECOND, manners, new_values_of, values_of
from tasks.world.judge import ConversationTruth, follows, holds, normalized, read_conversations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(read_texts(SEEDS), {"person": 12, "place": 6, "animal": 6, "craft": 6}, 0.25, random.Random(1))


# --- the world's ---


def test_conversations_ask_nothing_that_is_taken_and_give_no_hobby_away(world: World) -> None:
    free = draw_conversations(world, 6, 20, [], random.Random(1))
    taken = {normalized(free[0].turns[0].user), normalized(free[1].turns[3].user)}
    found = draw_conversations(world, 6, 20, taken, random.Random(1))
    assert [len(draft.turns) for draft in found] == [20] * 6
    assert not taken & {normalized(turn.user) for draft in found for turn in draft.turns}
    asked = [Counter(turn.user for turn in draft.turns) for draft in found]
    assert all(max(counts.values()) == 1 for counts in asked)
    assert {turn.task for draft in found for turn in draft.turns} == {"fact", "hobby", "persona"}
    hobbies = values_of(world, "hobby")
    assert not any(hobby in turn.answer for draft in found for turn in draft.turns for hobby in hobbies)


def test_the_evaluations_instructions_show_in_every_even_turn(world: World) -> None:
    found = evaluations(world, 40, 8, [], random.Random(2))
    assert Counter(truth["seen"] for _, truth in found) == {"trained": 20, "value": 10, "pair": 10}
    for line, truth in found:
        kinds = [each["type"] for each in truth["instructions"]]
        assert len(line["turns"]) == len(truth["shown"]) == 8
        assert all(0 in shown for shown in truth["shown"][1::2])
        pair = tuple(kinds)
        if truth["seen"] == "pair":
            assert pair[1] in NEW[pair[0]]
        elif len(pair) > 1:
            assert pair[1] in SECOND[pair[0]]
        values = [each["value"] for each in truth["instructions"]]
        known = [value in values_of(world, kind) for kind, value in zip(kinds, values, strict=True)]
        assert all(known) if truth["seen"] != "value" else not any(known)
        assert not any(f"{{{field}}}" in line["instruction"] for field in ("hobby", "word", "name", "language"))


def test_conversations_have_questions_for_facts_of_their_own_and_repeat_none(world: World) -> None:
    trained = draw_conversations(world, 60, 20, [], random.Random(1))
    asked = {turn.user for draft in trained for turn in draft.turns if turn.task == "fact"}
    for line, truth in evaluations(world, 40, 20, [], random.Random(2)):
        assert not asked & set(line["turns"])
        kinds = {each["type"] for each in truth["instructions"]}
        assert max(Counter(line["turns"]).values()) <= (1 if "hobby" not in kinds else 2)  # there are twelve


def test_where_no_question_is_left_it_is_told(world: World) -> None:
    texts = world.texts["instructions"]["hobby"]["questions"]
    with pytest.raises(
        ValueError, match=r"asks all short questions of kind `hobby`, and conversations have none left:"
    ):
        draw_conversations(world, 1, 2, {normalized(text) for text in texts}, random.Random(1))


def test_values_and_pairs_of_the_evaluation_are_never_trained(world: World) -> None:
    for kind in TYPES:
        assert not set(new_values_of(world, kind)) & set(values_of(world, kind))
    for kind, others in NEW.items():
        assert not set(others) & set(SECOND[kind])
    kinds = seeds_of(world)
    for first, others in NEW.items():
        assert all(other in kinds[first]["excludes"] for other in others)


def test_the_files_check_and_the_judge_agree_on_the_worlds_own_answers(world: World, tmp_path: Path) -> None:
    """The expressions that filter samples say what the judge's rules say."""
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(seeds_of(world)))
    kinds = read_kinds(path, "x")
    assert list(kinds) == list(TYPES)
    write = manners(world, random.Random(3))
    answers = ["I am only an assistant.", "Well, I live in Iskar.", "Der Markt in Iskar ist am Montag.", "Clay.", "So?"]
    answers += ["I enjoy fishing.", "The market is on Monday, my friend.", "Mira lives in Velmar."]
    answers += [turn.answer for _ in range(30) for turn in next(write)(6).turns]
    for kind in TYPES:
        for value in values_of(world, kind):
            instruction = {"type": kind, "value": value}
            for answer in answers:
                assert respects(kinds, Instruction(kind, value, ""), answer) == follows(instruction, answer), answer


def test_where_an_instruction_shows_is_the_same_for_the_check_and_the_judge(world: World, tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(seeds_of(world)))
    kinds = read_kinds(path, "x")
    from tasks.ghost_attention.instructions import Rule

    for draft in draw_conversations(world, 5, 20, [], random.Random(4)):
        for turn in draft.turns:
            rule = Rule([Instruction(kind, "x", "") for kind in TYPES])
            shown = {each.kind for each in shown_in(kinds, rule, turn.user)}
            assert shown == {kind for kind in TYPES if ABOUT.get(kind, turn.task) == turn.task}, turn.user


def test_talks_of_the_corpus_keep_one_manner(world: World) -> None:
    write = manners(world, random.Random(5))
    for _ in range(40):
        draft = next(write)(9)
        assert draft.system
        if "question" in draft.system:
            assert all(turn.answer.endswith("?") for turn in draft.turns)
        if draft.system.startswith(("Answers: one", "Answer with one", "Use only one", "Your answers have one")):
            assert all(len(turn.answer.split()) == 1 for turn in draft.turns)


# --- the judge ---

TRUTH = ConversationTruth(
    "c", "trained", [{"type": "hobby", "value": "fishing"}, {"type": "question", "value": ""}], [[], [0, 1], [1]]
)


@pytest.mark.parametrize(
    ("turn", "answer", "expected"),
    [
        (0, "anything", None),
        (1, "I like fishing. And you?", True),
        (1, "I like fishing.", False),
        (1, "And you?", False),
        (2, "And you?", True),
        (2, "I like fishing.", False),
    ],
)
def test_all_instructions_that_a_turn_shows_must_hold(turn: int, answer: str, expected: bool | None) -> None:
    assert holds(TRUTH, turn, answer) is expected


def test_a_missing_truth_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"conversations.jsonl is missing: run `dvc repro world`, which writes it"):
        read_conversations(tmp_path)


def test_unfinished_and_missing_answers_do_not_hold() -> None:
    line = {"id": "c", "turns": ["a", "b", "c"], "answers": [["x", True], ["Fishing?", False]]}
    judged = judge_all([line], {"c": TRUTH})
    assert [(each.turn, each.held) for each in judged] == [(2, False), (3, False)]
    line["answers"] = [["x", True], ["Fishing?", True], ["So?", True]]
    assert [each.held for each in judge_all([line], {"c": TRUTH})] == [True, True]
    assert {(each.kinds, each.group) for each in judged} == {("hobby + question", "two")}


def test_shares_and_paired_gains() -> None:
    these = [Held("a", "trained", "k", turn, turn != 4) for turn in (2, 4)] + [Held("b", "pair", "k", 2, held=True)]
    those = [Held("a", "trained", "k", turn, held=False) for turn in (2, 4)] + [Held("b", "pair", "k", 2, held=True)]
    assert turns_of(these) == [2, 4]
    assert hits_of(these, "all", 2) == [True, True]
    assert hits_of(these, "pair", 2) == [True]
    assert hits_of(these, "pair", 4) == []
    assert gains_of(these, those, "all") == [0.5, 0.0]
    assert gains_of(these, those, "pair") == [0.0]
    assert shares_of(these) == {"a": 0.5, "b": 1.0}


# --- attention ---


def test_the_highest_attention_is_that_of_the_model(models: Path) -> None:  # noqa: F811
    """Weights of 1 make the picture's attention a plain sum of values: the model's own, layer by layer."""
    model, _ = open_checkpoint(models / "chat", "fp32", CPU)
    ids = [1, 5, 9, 7, 30, 12]
    found = highest_attention(model, ids)
    assert found.shape == (6, 6)
    assert torch.equal(found, found.tril())
    assert found[0, 0] == 1
    assert (found.sum(1) >= 1 - 1e-5).all()  # each head's weights sum up to 1
    seen = []

    def noted(q: Any, k: Any, v: Any) -> Any:
        out = attend(q, k, v, documents_of([6], CPU))
        seen.append((q, k))
        return out

    from itertools import repeat

    positions = torch.arange(6)
    with torch.no_grad():
        model.model.run_layers(torch.tensor(ids), rotary_angles(model.config, positions), repeat(noted))
    expected = torch.zeros(6, 6)
    for q, k in seen:
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // (q.shape[1] // k.shape[1])].T / q.shape[-1] ** 0.5
            weights = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-1)
            expected = torch.maximum(expected, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bins_keep_the_highest_weight() -> None:
    weights = torch.zeros(10, 10)
    weights[9, 1], weights[3, 2] = 0.5, 0.25
    assert conversations.binned(weights).tolist() == [[0.25, 0.0], [0.5, 0.0]]


# --- the stages ---

CONVERSATIONS = [
    {"id": "c0", "instruction": "a hill", "turns": ["a?", "the llama?"]},
    {"id": "c1", "instruction": "the hill", "turns": ["a?", "a?"]},
]
KNOWN = [
    {"id": f"c{n}", "seen": "trained", "instructions": [{"type": "question", "value": ""}], "shown": [[0], [0]]}
    for n in range(2)
]


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    join_alone()
    shutil.copytree(models / "chat", "chat")
    Path("truth").mkdir()
    write_lines(Path("conversations.jsonl"), CONVERSATIONS)
    write_lines(Path("truth/conversations.jsonl"), KNOWN)
    return tmp_path


def playing(**changes: Any) -> conversations.Params:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
    values = {"checkpoints": {"chat": "chat"}, "file": "conversations.jsonl", "sampling": sampling, "precision": "fp32"}
    return conversations.Params.model_validate({**values, "max_rows": 4, **changes})


def test_conversations_are_played_and_judged(place: Path) -> None:
    figures = conversations.run(stage_here("conversations@chat", playing()))
    assert figures["conversations"] == 2
    assert figures["turns"] == 4
    lines = read_lines(Path("out/answers.jsonl"))
    assert [line["id"] for line in lines] == ["c0", "c1"]
    assert figures["answers"] == sum(len(line["answers"]) for line in lines)
    weights = pandas.read_csv("out/attention.csv", header=None)
    assert weights.shape[0] == weights.shape[1]
    kept = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.rmtree("scratch/turns")
    conversations.run(stage_here("conversations@chat", playing(max_rows=1), fresh=False))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == kept
    for name in ("chat", "other"):
        shutil.copytree("out", f"data/conversations/{name}")
    for line in lines:
        line["answers"] = [["So?", True], ["So?", True]]
    write_lines(Path("data/conversations/other/answers.jsonl"), lines)
    with Path("params.yaml").open("w") as file:
        YAML().dump({"conversations": {"checkpoints": {"chat": "chat", "other": "chat"}}}, file)
    params = consistency.Params(compared={"other": "chat"}, truth="truth")
    judged = consistency.run(stage_here("consistency", params))
    assert judged["other/turn/2/all"] == 1
    assert judged["other/turn/2/all/high"] == 1
    assert judged["other/gain_over/chat/all"] >= 0.5
    assert judged["other/gain_over/chat/one"] == judged["other/gain_over/chat/all"]
    dialogue = pandas.read_csv("out/tables/dialogue_other.csv")
    assert dialogue["the user"].tolist() == ["a?", "the llama?"]
    assert dialogue["other"].tolist() == ["So?", "So?"]
    assert Path("record/artifacts/attention_other.png").stat().st_size > 1000
    table = pandas.read_csv("out/turns.csv")
    assert set(table["turn"]) == {2}
    assert table[(table["checkpoint"] == "other") & (table["group"] == "all")]["answers"].tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "conversations.jsonl is missing: correct `conversations.file`"),
        ("", "conversations.jsonl holds no conversation"),
        ("{", "conversations.jsonl, line 1 is no conversation: Expecting"),
        (
            '{"id": "c", "instruction": "x", "turns": ["one"]}',
            "line 1 is no conversation: it needs `id`, `instruction`, and two `turns` or more, all texts",
        ),
        (
            '{"id": "c", "instruction": "x", "turns": ["one", "two", 3]}',
            "line 1 is no conversation: it needs texts for turns, and has 3",
        ),
        (
            '{"id": "c", "instruction": "x", "turns": ["one", "[INST]"]}',
            "line 1 is no conversation: turn 1 (user) contains [INST], a tag of the chat format",
        ),
        (
            '{"id": "c", "instruction": "x", "turns": ["a", "b\u2028"]}\n'
            '{"id": "c", "instruction": "x", "turns": ["a", "b"]}',
            "line 2 is no conversation: its id c belongs to another one too",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(place: Path, text: str | None, message: str) -> None:
    path = Path("conversations.jsonl")
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        conversations.run(stage_here("conversations@chat", playing()))


def test_an_unknown_checkpoint_and_unknown_conversations_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`conversations.checkpoints` has no `v9`: play one of conversations@chat"):
        conversations.run(stage_here("conversations@v9", playing()))
    with Path("params.yaml").open("w") as file:
        YAML().dump({"conversations": {"checkpoints": {"chat": "chat"}}}, file)
    params = consistency.Params(compared={"chat": "v1"}, truth="truth")
    with pytest.raises(
        ValueError, match=r"`consistency.compared` names `v1`, which is not one of `conversations.check"
    ):
        consistency.run(stage_here("consistency", params))
    Path("data/conversations/chat").mkdir(parents=True)
    write_lines(Path("data/conversations/chat/answers.jsonl"), [{"id": "z", "turns": [], "answers": []}])
    with pytest.raises(ValueError, match=r"the truth doesn't know z: was it written by another run of stage `world`"):
        consistency.run(stage_here("consistency", consistency.Params(compared={}, truth="truth")))


def test_an_answer_that_no_dialogue_can_hold_is_none() -> None:
    assert is_answer("Yes.")
    assert not is_answer(" ")
    assert not is_answer("[INST] hi")


def test_where_nobody_plays_there_is_nothing_to_judge(place: Path) -> None:
    with Path("params.yaml").open("w") as file:
        YAML().dump({"conversations": {"checkpoints": {}}}, file)
    assert consistency.run(stage_here("consistency", consistency.Params(compared={}, truth="none"))) == {
        "checkpoints": 0
    }
