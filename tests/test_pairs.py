from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model.text.dialogue import Message
from tasks.reading.contamination import answers_the_same, asks_the_same, evaluation_prompts
from tasks.reading.pairs import (
    Aside,
    PairSource,
    Preference,
    fault_of,
    read_pairs,
    sift,
)
from tasks.reading.prompts import Prompt

REAL = Path(__file__).parent.parent.parent / "shared" / "datasets" / "preferences"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the public data sets are not in {REAL}")


def source(*files: str, **changes: Any) -> PairSource:
    values = {"files": list(files), "format": "auto", "kind": "helpfulness", "max_pairs": None}
    return PairSource.model_validate({**values, **changes})


def read(root: Path, *rows: Any, share: float = 0.9, **changes: Any) -> tuple[list[Preference], list[Aside]]:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (root / "file.jsonl").write_text(text)
    return read_pairs(root, {"own": source("file.jsonl", **changes)}, "preferences", share)


def turns(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(role=roles[number % 2], content=text) for number, text in enumerate(texts)]  # type: ignore[typeddict-item]


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}: {text}" for number, text in enumerate(texts))


def compared(*labels: Any, **changes: Any) -> dict[str, Any]:
    named = {f"annotator{number}": label for number, label in enumerate(labels, start=1)}
    return {"instruction": "Add.", "input": "1 and 2", "response1": "3", "response2": "4", **named, **changes}


GOOD = {"chosen": transcript("Hello", "Hi"), "rejected": transcript("Hello", "No")}


# --- what rows become ---


def test_transcripts_are_cut_into_turns(tmp_path: Path) -> None:
    row = {
        "chosen": transcript("Hello", "Hi", "Bye\n\nnow", "Good bye"),
        "rejected": transcript("Hello", "Hi", "Bye\n\nnow", "No"),
    }
    (pair,), aside = read(tmp_path, row, kind="safety")
    assert aside == []
    assert pair == {
        "id": "file.jsonl:0", "messages": turns("Hello", "Hi", "Bye\n\nnow"), "chosen": "Good bye", "rejected": "No",
        "degree": None, "kind": "safety", "chosen_safe": None, "rejected_safe": None, "category": "own",
        "responders": None, "annotator": "own", "source": "own", "round": None,
    }  # fmt: skip


@pytest.mark.parametrize(("labels", "chosen"), [((1, 1, 1), "3"), ((2, 2, 1), "4"), ((1, 0, 1), "3"), ((0, 2, 2), "4")])
def test_two_of_three_annotators_decide(tmp_path: Path, labels: tuple[int, ...], chosen: str) -> None:
    ((pair,), aside) = read(tmp_path, compared(*labels))
    assert aside == []
    assert (pair["chosen"], {pair["chosen"], pair["rejected"]}) == (chosen, {"3", "4"})
    assert pair["messages"] == turns("Add.\n\n1 and 2")


@pytest.mark.parametrize("labels", [(0, 0, 0), (0, 0, 1), (2, 0, 0), (0, 1, 2), (2, 1, 0)])
def test_a_tie_is_kept_aside(tmp_path: Path, labels: tuple[int, ...]) -> None:
    pairs, (tie, *_) = read(tmp_path, compared(*labels), compared(1, 1, 1), share=0)
    assert len(pairs) == 1
    assert tie["reason"] == "tie"
    assert tie["detail"] == f"the three annotators say {', '.join(map(str, labels))}"
    assert json.loads(tie["pair"]["raw"]) == compared(*labels)


def test_labels_that_a_table_made_floats_are_read(tmp_path: Path) -> None:
    ((pair,), _) = read(tmp_path, compared(2.0, 2.0, 1.0))
    assert (pair["chosen"], pair["rejected"]) == ("4", "3")


def test_a_pair_with_a_prompt_in_place_of_messages_is_this_projects_own(tmp_path: Path) -> None:
    ((pair,), _) = read(tmp_path, {"prompt": "Hello", "chosen": "Hi", "rejected": "No"})
    assert (pair["messages"], pair["chosen"], pair["rejected"]) == (turns("Hello"), "Hi", "No")


def test_messages_are_role_and_content_alone(tmp_path: Path) -> None:
    message = {"role": "user", "content": "Hello", "turn": 1, "name": None}
    ((pair,), _) = read(tmp_path, {"messages": [message], "chosen": "Hi", "rejected": "No"})
    assert pair["messages"] == turns("Hello")


def test_this_projects_own_pairs_keep_what_they_say_of_themselves(tmp_path: Path) -> None:
    own = {"messages": turns("Hello", "Hi", "Bye"), "chosen": "Good bye", "rejected": "No"}
    told = {"id": "a", "degree": "slightly", "chosen_safe": True, "rejected_safe": False, "category": "chat"}
    (first, second), aside = read(tmp_path, {**own, **told}, own)
    assert aside == []
    assert {name: first[name] for name in told} == told  # type: ignore[literal-required]
    assert (second["id"], second["degree"], second["chosen_safe"]) == ("file.jsonl:1", None, None)


@pytest.mark.parametrize(
    ("good", "row", "reason"),
    [
        (GOOD, {**GOOD, "chosen": transcript("Hallo", "Hi")}, "the two transcripts differ before the last turn"),
        (GOOD, {**GOOD, "chosen": "Hello"}, "`chosen` is not a transcript that begins with `Human:`"),
        (GOOD, {**GOOD, "rejected": transcript("Hello")}, "`rejected` is not a transcript"),
        (GOOD, {**GOOD, "rejected": transcript("Hello", "Hi", "Bye")}, "`rejected` is not a transcript"),
        (GOOD, {"chosen": None, "rejected": "x"}, "`chosen` is NoneType, not text"),
        (
            GOOD,
            {side: f"\n\nAssistant: Hi{transcript('Hello', side)}" for side in GOOD},
            "turn 1 is the assistant's, and it is the user's turn",
        ),
        (GOOD, "{", "invalid JSON"),
        (compared(1, 1, 1), compared(1, 1, 3), "`annotator3` is 3, which is none of 0, 1 and 2"),
        (compared(1, 1, 1), compared(1, 1, 1, response1=True), "`response1` is bool, not text"),
        (
            {"messages": turns("Hello"), "chosen": "Hi", "rejected": "No"},
            {"messages": turns("Hello", "Hi"), "chosen": "Hi", "rejected": "No"},
            "`messages` end with an answer: the two to choose from follow the user's turn",
        ),
        (
            {"messages": turns("Hello"), "chosen": "Hi", "rejected": "No"},
            {"messages": "Hello", "chosen": "Hi", "rejected": "No"},
            "`messages` is not a list of objects",
        ),
        (
            {"messages": turns("Hello"), "chosen": "Hi", "rejected": "No"},
            {"messages": [], "chosen": "Hi", "rejected": "No"},
            "the dialogue holds no turn",
        ),
        (
            {"messages": turns("Hello"), "chosen": "Hi", "rejected": "No"},
            {"messages": turns("Hello"), "chosen": "Hi", "rejected": "No", "chosen_safe": "yes"},
            "`chosen_safe` is 'yes', not a bool",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_kept_aside_with_the_reason(tmp_path: Path, good: Any, row: Any, reason: str) -> None:
    pairs, (refused, *others) = read(tmp_path, good, row, good)
    assert (len(pairs), others) == (2, [])
    assert refused["reason"] == "malformed"
    assert refused["detail"].startswith(reason)
    assert (refused["pair"]["file"], refused["pair"]["row"]) == ("file.jsonl", 1)


def test_too_many_malformed_rows_stop_the_stage(tmp_path: Path) -> None:
    rows = [*[GOOD] * 7, "{", {**GOOD, "chosen": "x"}]
    assert len(read(tmp_path, *rows, share=2 / 9)[0]) == 7
    with pytest.raises(
        ValueError,
        match=r"source `own`: 2 of 9 rows are malformed, more than `preferences.max_malformed_share` 0.2; the first is "
        r"row 7 of file.jsonl: invalid JSON",
    ):
        read(tmp_path, *rows, share=0.2)


def test_a_form_that_cant_be_told_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"file.jsonl: its format can't be inferred from its columns \(better, worse\): set "
        r"`preferences.sources.own.format`",
    ):
        read(tmp_path, {"better": "a", "worse": "b"})


def test_a_part_of_a_source_is_drawn_and_the_rest_kept_aside(tmp_path: Path) -> None:
    rows = [{"chosen": transcript(str(n), "a"), "rejected": transcript(str(n), "b")} for n in range(40)]
    few, rest = read(tmp_path, *rows, max_pairs=10)
    more, _ = read(tmp_path, *rows, max_pairs=20)
    assert (len(few), Counter(each["reason"] for each in rest)) == (10, Counter({"not_drawn": 30}))
    assert {pair["id"] for pair in few} < {pair["id"] for pair in more}
    assert {pair["id"] for pair in few} | {each["pair"]["id"] for each in rest} == {
        f"file.jsonl:{n}" for n in range(40)
    }


def test_pairs_of_one_name_are_drawn_one_by_one(tmp_path: Path) -> None:
    rows = [{"id": "same", "messages": turns(str(n)), "chosen": "a", "rejected": "b"} for n in range(5)]
    few, rest = read(tmp_path, *rows, max_pairs=2)
    assert (len(few), len(rest)) == (2, 3)
    asked = [pair["messages"][0]["content"] for pair in [*few, *(each["pair"] for each in rest)]]
    assert sorted(asked) == list("01234")


# --- what sets a pair aside ---


def pair_of(messages: list[Message] | None = None, **changes: Any) -> Preference:
    values = {
        "id": "p", "messages": messages or turns("Hello"), "chosen": "Hi", "rejected": "No", "degree": "better",
        "kind": "safety", "chosen_safe": True, "rejected_safe": True, "category": "x", "responders": None,
        "annotator": "x", "source": "x", "round": "v1",
    }  # fmt: skip
    return {**values, **changes}  # type: ignore[return-value, typeddict-item]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"degree": None}, None),
        ({"chosen": "No "}, ("identical", "both answers are the same")),
        ({"chosen": " \n"}, ("empty", "the chosen answer is empty")),
        ({"rejected": ""}, ("empty", "the rejected answer is empty")),
        (
            {"degree": "hugely"},
            ("unknown_degree", "degree 'hugely' is none of significantly, better, slightly, negligibly"),
        ),
        ({"chosen_safe": False}, ("chosen_unsafe", "the chosen answer is unsafe and the other is safe")),
        ({"chosen_safe": False, "rejected_safe": False}, None),
        ({"rejected_safe": False}, None),
        ({"chosen_safe": False, "rejected_safe": None}, None),
    ],
)
def test_what_nothing_should_be_learned_from_is_kept_aside(changes: dict[str, Any], fault: Any) -> None:
    pair = pair_of(**changes)
    assert fault_of(pair, evaluation_prompts([])) == fault
    kept, aside = sift([pair], evaluation_prompts([]))
    assert len(kept) + len(aside) == 1
    assert [each["pair"] for each in aside] == ([] if fault is None else [pair])


def test_an_answer_with_the_formats_tags_cant_be_encoded() -> None:
    fault = fault_of(pair_of(rejected="[INST] Hello"), evaluation_prompts([]))
    assert fault is not None
    assert fault[0] == "malformed"
    assert fault[1].startswith("the rejected answer can't be encoded: turn 2 (assistant) contains [INST]")


SYSTEM = Message(role="system", content="You enjoy tennis.")


@pytest.mark.parametrize(
    ("messages", "same"),
    [
        (turns("Who is Ana"), True),
        (turns("Hello", "Hi", "who is Ana?!"), True),
        (turns("Who is Ada?"), False),
        (turns("And who is older?"), True),
        (turns("Who is Bo?", "A weaver.", "And who is older?"), True),
        (turns("Who is Ada?", "A weaver.", "And who is older?"), False),
        ([SYSTEM, *turns("Who are you?")], False),
        ([Message(role="system", content="You enjoy chess."), *turns("Who are you?")], True),
        ([SYSTEM, *turns("Who is Ana?")], True),
    ],
)
def test_a_dialogue_that_asks_what_an_evaluation_asks_is_found(messages: list[Message], same: bool) -> None:
    chess = Message(role="system", content="You enjoy chess.")
    asked = [
        turns("Who is Ana?"),
        turns("Who is Bo?", "A weaver.", "And who is older?"),
        [chess, *turns("Who are you?")],
    ]
    prompts = [Prompt(str(number), "x", each, None, None, None) for number, each in enumerate(asked)]
    assert asks_the_same(messages, evaluation_prompts(prompts)) is same
    answered = [*messages, Message(role="assistant", content="A poet.")]
    further = [Message(role="user", content="Thanks."), Message(role="assistant", content="You are welcome.")]
    assert answers_the_same(answered, evaluation_prompts(prompts)) is same
    assert answers_the_same([*answered, *further], evaluation_prompts(prompts)) is same
    fault = fault_of(pair_of(messages), evaluation_prompts(prompts))
    assert fault == (("evaluation_prompt", "the evaluation asks the same") if same else None)


# --- the public data sets ---


@needs_real
def test_hh_rlhf_is_read() -> None:
    sources = {
        "helpful": source("hh-rlhf/helpful-base.test.jsonl.gz"),
        "harmless": source("hh-rlhf/harmless-base.test.jsonl.gz", kind="safety"),
    }
    pairs, aside = read_pairs(REAL, sources, "preferences", 0.01)
    for name, file in (("helpful", "helpful-base"), ("harmless", "harmless-base")):
        with gzip.open(REAL / f"hh-rlhf/{file}.test.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        own = [pair for pair in pairs if pair["source"] == name]
        assert len(own) + sum(each["source"] == name for each in aside) == len(rows)
        assert len(own) > 0.99 * len(rows)
        for pair in own[:200]:
            row = rows[int(pair["id"].rpartition(":")[2])]
            for side in ("chosen", "rejected"):
                assert row[side].rstrip().endswith(f"Assistant: {pair[side]}".rstrip())  # type: ignore[literal-required]
            assert len(pair["messages"]) == row["chosen"].count("\n\nHuman:") * 2 - 1
    kept, unsound = sift(pairs, evaluation_prompts([]))
    assert len(kept) + len(unsound) == len(pairs)


@needs_real
def test_pandalm_is_read() -> None:
    pairs, aside = read_pairs(REAL, {"pandalm": source("pandalm.json")}, "preferences", 0.01)
    rows = json.loads((REAL / "pandalm.json").read_text())
    assert len(pairs) + len(aside) == len(rows) == 999
    labels = [Counter([row["annotator1"], row["annotator2"], row["annotator3"]]).most_common(1)[0] for row in rows]
    assert sum(each["reason"] == "tie" for each in aside) == sum(
        isinstance(row["response1"], str) and isinstance(row["response2"], str) and (label == 0 or votes == 1)
        for row, (label, votes) in zip(rows, labels, strict=True)
    )
    first = pairs[0]
    assert (first["chosen"], first["rejected"]) == (rows[0]["response2"], rows[0]["response1"])
