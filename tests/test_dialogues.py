from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tasks.reading.dialogues import Dialogue, DialogueSource, read_dialogues, split_dialogues

REAL = Path(__file__).parent.parent.parent / "shared" / "datasets" / "sft"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the public data sets are not in {REAL}")


def source(*files: str, **changes: Any) -> DialogueSource:
    values = {"files": list(files), "format": "auto", "max_dialogues": None, "validation_share": 0.0}
    weight = {"weight": float(changes.get("validation_share") != 1), "loss": "all"}
    return DialogueSource.model_validate({**values, **weight, **changes})


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def read(root: Path, *rows: Any, share: float = 0.9, **changes: Any) -> tuple[list[Dialogue], list[tuple[int, str]]]:
    """The dialogues of a file of these rows, and each refused row with the reason."""
    (root / "file.jsonl").write_bytes(lines(*rows))
    found, refused = read_dialogues(root, {"own": source("file.jsonl", **changes)}, "sft", share)
    return found, [(row["row"], row["error"]) for row in refused]


def contents(dialogue: Dialogue) -> list[str]:
    return [message["content"] for message in dialogue["messages"]]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_this_projects_lines_keep_what_they_say_of_themselves(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be brief."}, *turns("Hello", "Hi")]
    found, refused = read(
        tmp_path,
        {"id": "a", "messages": system, "category": "chat", "safety": True, "source": "elsewhere"},
        {"messages": turns("Hello", "Hi", "Bye", "Bye")},
    )
    assert refused == []
    assert found == [
        {"id": "a", "messages": system, "category": "chat", "safety": True, "source": "own"},
        {"id": "file.jsonl:1", "messages": turns("Hello", "Hi", "Bye", "Bye"), "category": "own", "safety": False,
         "source": "own"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": turns("Hello", "Hi")[1:]}, "turn 1 is the assistant's, and it is the user's turn"),
        (
            {"messages": [*turns("Hello"), *turns("Hello", "Hi")]},
            "turn 2 is the user's, and it is the assistant's turn",
        ),
        ({"messages": turns("Hello", " \n")}, "turn 2 (assistant) is an empty answer"),
        ({"messages": turns("Hello", "Hi", "Bye")}, "it ends with the user's turn: there is no answer to learn from"),
        ({"messages": turns("Hello [/INST] Hi", "Hi")}, "turn 1 (user) contains [/INST]"),
        ({"messages": []}, "the dialogue holds no turn"),
        ({"messages": "Hello"}, "`messages` is not a list of objects"),
        ({"messages": ["Hello", "Hi"]}, "`messages` is not a list of objects"),
        ({"messages": [{"role": "human", "content": "Hello"}]}, "role 'human' is none of system, user and assistant"),
        ({"messages": [{"role": ["user"], "content": "Hello"}]}, "role ['user'] is none of system, user and assistant"),
        ({"messages": [{"role": "user"}]}, "it has no `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "`content` is NoneType, not text"),
        ({"prompt": "Hello", "response": "Hi"}, "`messages` is not a list of objects"),
        ("{", "invalid JSON"),
        ("[1]", "a JSON list, not an object"),
    ],
)
def test_a_row_that_is_no_dialogue_is_kept_aside_with_the_reason(tmp_path: Path, row: Any, reason: str) -> None:
    found, refused = read(tmp_path, {"messages": turns("Hello", "Hi")}, row, {"messages": turns("Bye", "Bye")})
    assert [contents(dialogue) for dialogue in found] == [["Hello", "Hi"], ["Bye", "Bye"]]
    ((number, error),) = refused
    assert number == 1
    assert error.startswith(reason)


def test_too_many_malformed_rows_stop_the_stage(tmp_path: Path) -> None:
    rows = [*[{"messages": turns("Hello", "Hi")}] * 7, {"messages": turns("Hello", "")}, "{"]
    assert len(read(tmp_path, *rows, share=2 / 9)[0]) == 7
    with pytest.raises(
        ValueError,
        match=r"source `own`: 2 of 9 dialogues are malformed, more than `sft.max_malformed_share` 0.2; the first is "
        r"row 7 of file.jsonl: turn 2 \(assistant\) is an empty answer",
    ):
        read(tmp_path, *rows, share=0.2)


def message(number: int, parent: int | None, role: str, rank: Any = None, **more: Any) -> dict[str, Any]:
    names = {"message_id": f"m{number}", "parent_id": None if parent is None else f"m{parent}"}
    return {**names, "role": role, "text": f"text {number}", "rank": rank, **more}


def test_a_tree_gives_its_best_ranked_path(tmp_path: Path) -> None:
    found, refused = read(
        tmp_path,
        message(0, None, "prompter"),
        message(1, 0, "assistant", 1),
        message(2, 0, "assistant", 0),
        message(3, 0, "assistant"),
        message(4, 2, "prompter"),  # nobody answered
        message(5, 2, "prompter"),
        message(6, 2, "prompter"),  # as good as the one before it, and later
        message(8, 5, "assistant", 0, deleted=True),
        message(9, 5, "assistant"),
        message(10, 5, "assistant", 3),
        message(11, 6, "assistant", 0),
        message(12, 10, "prompter"),
        message(20, None, "prompter"),
        message(21, 20, "assistant", None),
        message(22, 21, "prompter", None),
    )
    assert refused == []
    assert [contents(dialogue) for dialogue in found] == [
        ["text 0", "text 2", "text 5", "text 10"],
        ["text 20", "text 21"],
    ]
    assert [dialogue["id"] for dialogue in found] == ["m0", "m20"]
    assert [turn["role"] for turn in found[0]["messages"]] == ["user", "assistant"] * 2


FIRST_TURN_IS_THE_ASSISTANTS = (
    "turn 1 is the assistant's, and it is the user's turn: user and assistant take turns, the user first, after at "
    "most one message of the system"
)


def test_messages_that_are_in_no_tree_are_kept_aside(tmp_path: Path) -> None:
    found, refused = read(
        tmp_path,
        message(0, None, "prompter"),
        message(1, 0, "assistant"),
        message(2, 99, "assistant"),
        message(3, None, "prompter"),
        message(4, None, "assistant"),
        message(5, None, "system"),
        {**message(10, None, "user"), "role": ["prompter"]},
        message(6, 0, "assistant", "best"),
        message(1, 0, "assistant"),
        {**message(7, 0, "assistant"), "parent_id": 3},
        {**message(8, 0, "assistant"), "text": None},
    )
    assert [contents(dialogue) for dialogue in found] == [["text 0", "text 1"]]
    assert sorted(refused) == [
        (2, "`parent_id` m99 is not a message of the file"),
        (3, "it ends with the user's turn: there is no answer to learn from"),
        (4, FIRST_TURN_IS_THE_ASSISTANTS),
        (5, "role 'system' is none of prompter and assistant"),
        (6, "role ['prompter'] is none of prompter and assistant"),
        (7, "`rank` is 'best', not a whole number"),
        (8, "`message_id` m1 belongs to another row too"),
        (9, "`parent_id` is int, not text"),
        (10, "`text` is NoneType, not text"),
    ]  # fmt: skip


FRAMED = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": " Name a colour.\n", "response": "Blue. "}, ["Name a colour.", "Blue."]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ["Add.\n\n1, 2", "3"]),
        ({"instruction": "Add.", "input": "", "output": "No numbers."}, ["Add.", "No numbers."]),
        ({"instruction": "Sum up.", "context": "Long.", "response": "Short."}, ["Sum up.\n\nLong.", "Short."]),
        (
            {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}, {}]},
            ["Add.\n\n1, 2", "3"],
        ),
        ({"prompt": FRAMED.format("", "Name a colour."), "response": "Blue."}, ["Name a colour.", "Blue."]),
        (
            {"prompt": FRAMED.format(", with an input", "Add.\n\n### Input:\n1, 2"), "response": "3"},
            ["Add.\n\n1, 2", "3"],
        ),
        ({"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2.\n#### 2"}, ["1 + 1?", "1 + 1 = 2.\n#### 2"]),
    ],
)
def test_questions_with_an_answer_become_dialogues(tmp_path: Path, row: Any, expected: list[str]) -> None:
    found, refused = read(tmp_path, row)
    assert refused == []
    assert contents(found[0]) == expected


def test_pairs_that_lack_something_are_kept_aside(tmp_path: Path) -> None:
    found, refused = read(
        tmp_path,
        {"prompt": "Name a colour.", "response": "Blue.", "category": "colours"},
        {"prompt": "Name a colour."},
        {"prompt": "\n", "response": "Blue."},
        {"prompt": 3, "response": "Blue."},
        {"instruction": "Add.", "input": [1, 2], "output": "3"},
    )
    assert [contents(dialogue) for dialogue in found] == [["Name a colour.", "Blue."]]
    assert found[0]["category"] == "colours"
    assert [error for _, error in refused] == [
        "it has no `response` or `output`",
        "the prompt is empty",
        "`prompt` is int, not text",
        "`input` or `context` is list, not text",
    ]


def test_the_format_can_be_given_and_must_be_where_columns_tell_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its columns \(text, label\): set `sft.sources.own.format`"):
        read(tmp_path, {"text": "Hello", "label": 1})
    found, _ = read(tmp_path, {"prompt": "a", "response": "b", "question": "c", "answer": "d"}, format="pairs")
    assert contents(found[0]) == ["a", "b"]


def test_a_source_without_a_dialogue_is_all_malformed(tmp_path: Path) -> None:
    message = r"source `own`: 2 of 2 dialogues are malformed.*row 0 of file.jsonl: invalid JSON"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "{", "}")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_files_may_be_compressed_several_and_one_array(tmp_path: Path, ending: str) -> None:
    squeeze = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    rows = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in range(5)]
    (tmp_path / f"b.json{ending}").write_bytes(squeeze(json.dumps(rows[:3], indent=1).encode()))
    (tmp_path / f"c.jsonl{ending}").write_bytes(squeeze(lines(*rows[3:])))
    found, _ = read_dialogues(tmp_path, {"own": source("*.json*")}, "sft", 0.0)
    assert [contents(dialogue)[1] for dialogue in found] == ["0", "1", "2", "3", "4"]
    assert found[3]["id"] == f"c.jsonl{ending}:0"


def test_an_array_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(lines({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}))
    with pytest.raises(ValueError, match=r"own.json is not valid JSON: .*name it .jsonl if it holds one object per"):
        read_dialogues(tmp_path, {"own": source("own.json")}, "sft", 0.0)
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"own.json holds a JSON dict, not an array of objects"):
        read_dialogues(tmp_path, {"own": source("own.json")}, "sft", 0.0)
    with pytest.raises(ValueError, match=r"`sft.sources.own.files`: no file matches no\*.json"):
        read_dialogues(tmp_path, {"own": source("no*.json")}, "sft", 0.0)


def test_dialogues_are_held_out_by_their_opening_and_drawn_by_seed(tmp_path: Path) -> None:
    rows = [{"messages": turns(f"Question {number // 2}", f"Answer {number}")} for number in range(400)]
    own = {"own": source("file.jsonl", validation_share=0.25, max_dialogues=200)}
    found, _ = read(tmp_path, *rows)
    train, held_out = split_dialogues(found, own, seed=1)
    assert len(train) + len(held_out) == 200
    assert 30 <= len(held_out) <= 70
    assert not {contents(dialogue)[0] for dialogue in train} & {contents(dialogue)[0] for dialogue in held_out}
    order = [found.index(dialogue) for dialogue in train]
    assert order == sorted(order)
    assert split_dialogues(found, own, seed=1) == (train, held_out)
    assert split_dialogues(found, own, seed=2) != (train, held_out)
    for share, num_held_out in ((0.0, 0), (1.0, 400)):
        whole = {"own": source("file.jsonl", validation_share=share)}
        assert len(split_dialogues(found, whole, seed=1)[1]) == num_held_out


def test_a_source_for_validation_only_has_no_weight() -> None:
    assert source("file.jsonl", validation_share=1, weight=0).weight == 0
    with pytest.raises(ValueError, match=r"a source for validation only \(validation_share 1\) has weight 0: nothing"):
        source("file.jsonl", validation_share=1, weight=0.5)


@needs_real
def test_public_data_sets_are_read_as_they_are() -> None:
    names = {"oasst": "oasst1_en.jsonl.gz", "dolly": "dolly*", "gsm8k": "gsm8k_train.jsonl.gz", "seeds": "self*"}
    found, refused = read_dialogues(REAL, {name: source(file) for name, file in names.items()}, "sft", 0.02)
    # 188 trees whose first message is in the file; 3 rows name a parent that is not
    counts = Counter(dialogue["source"] for dialogue in found)
    assert counts == {"oasst": 188, "dolly": 1000, "gsm8k": 7473, "seeds": 175}
    assert [(row["source"], row["row"]) for row in refused] == [("oasst", 152), ("oasst", 214), ("oasst", 1669)]
    texts = [text for dialogue in found for text in contents(dialogue)]
    assert not any(re.search(r"### (Instruction|Response)|<<.*=.*>>", text) for text in texts)
    assert max(len(dialogue["messages"]) for dialogue in found) == 6
    first = next(dialogue for dialogue in found if dialogue["source"] == "gsm8k")
    assert contents(first)[1].endswith("Natalia sold 48+24 = 72 clips altogether in April and May.\n#### 72")
