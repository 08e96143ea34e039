from __future__ import annotations

import csv
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.labels import Decision, Labels, decide, find_labels, read_labels
from tasks.reading.prompts import DEGREES, Label
from tasks.running.stage import Waiting

BATCH = "v1-safety-0123456789ab"
IDS = {"a", "b", "c"}


def row(pair: str = "a", annotator: str = "ann", **changes: Any) -> dict[str, Any]:
    values = {"batch": BATCH, "id": pair, "annotator": annotator, "choice": "left", "degree": "better"}
    return {**values, "left_safe": True, "right_safe": False, **changes}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Labels in the form that the file's name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row()))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(export(*rows)))
    return path


def export(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What Label Studio exports as JSON: a task with its annotations, each a list of results."""
    tasks: dict[str, dict[str, Any]] = {}
    for each in rows:
        data = {"batch": each["batch"], "id": each["id"], "dialogue": [], "left": "x", "right": "y"}
        task = tasks.setdefault(each["id"], {"id": 7, "data": data, "annotations": [], "predictions": []})
        said = {
            name: each[name] for name in ("choice", "degree", "left_safe", "right_safe") if each.get(name) is not None
        }
        results = [
            {
                "id": f"r{name}", "type": "choices", "origin": "manual", "from_name": name, "to_name": "dialogue",
                "value": {"choices": [{True: "safe", False: "unsafe"}.get(value, value)]},
            }
            for name, value in said.items()
        ]  # fmt: skip
        task["annotations"].append(
            {"result": results, "was_cancelled": False, "completed_by": {"email": each["annotator"]}}
        )
    return list(tasks.values())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_every_form_gives_the_same_labels(tmp_path: Path, suffix: str) -> None:
    rows = [
        row("a"), row("b", choice="right", degree="negligibly", left_safe=False), row("a", "ben", right_safe=True),
        row("c", degree="hugely"),
    ]  # fmt: skip
    labels = read_labels(write(tmp_path / f"safety{suffix}", *rows), "safety", BATCH, IDS)
    assert labels.by_pair == {
        "a": [Label(0, "better", (True, False), "ann"), Label(0, "better", (True, True), "ben")],
        "b": [Label(1, "negligibly", (False, False), "ann")],
    }
    assert list(labels.faults) == ["c"]
    assert labels.num_replaced == 0


def test_labels_of_helpfulness_need_no_safety(tmp_path: Path) -> None:
    plain = {name: value for name, value in row().items() if not name.endswith("_safe")}
    assert read_labels(write(tmp_path / "h.jsonl", plain), "helpfulness", BATCH, IDS).by_pair == {
        "a": [Label(0, "better", None, "ann")]
    }


def test_an_annotators_later_label_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    rows = [row(), row("a", "ben"), row(choice="right", degree="slightly")]
    labels = read_labels(write(tmp_path / "safety.jsonl", *rows), "safety", BATCH, IDS)
    assert {label.annotator: label.choice for label in labels.by_pair["a"]} == {"ann": 1, "ben": 0}
    assert labels.num_replaced == 1


def test_a_file_without_a_line_has_no_label(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path / "safety.jsonl"), "safety", BATCH, IDS) == Labels({}, {}, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_several_labels_of_a_pair_need_their_annotators(tmp_path: Path, suffix: str) -> None:
    nameless = row(annotator="")
    labels = read_labels(write(tmp_path / f"safety{suffix}", nameless, row("b", "")), "safety", BATCH, IDS)
    assert [label.annotator for own in labels.by_pair.values() for label in own] == ["unknown", "unknown"]
    path = write(tmp_path / f"safety{suffix}", nameless, row(choice="right", annotator=""))
    with pytest.raises(ValueError, match=r"is a second label of pair a without an `annotator`: name the annotators, "):
        read_labels(path, "safety", BATCH, IDS)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"choice": "both"}, "choice 'both' is neither left nor right"),
        ({"choice": None}, "choice None is neither left nor right"),
        ({"degree": "hugely"}, "unknown degree 'hugely': it is none of significantly, better, slightly, negligibly"),
        ({"right_safe": None}, "right_safe None is neither true nor false"),
        ({"left_safe": "yes"}, "left_safe 'yes' is neither true nor false"),
    ],
)
def test_a_label_that_says_nothing_known_does_not_count(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    labels = read_labels(write(tmp_path / "s.jsonl", row(**changes), row("b")), "safety", BATCH, IDS)
    assert labels == Labels({"b": [Label(0, "better", (True, False), "ann")]}, {"a": [f"line 1: {fault}"]}, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_labels_of_another_batch_or_pair_stop_the_stage(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"safety{suffix}", row(), row("b", batch="v1-safety-ba9876543210"))
    with pytest.raises(ValueError, match=rf"is a label of batch v1-safety-ba9876543210, but {BATCH} is expected"):
        read_labels(path, "safety", BATCH, IDS)
    write(path, row("z"))
    with pytest.raises(ValueError, match=rf"is a label of pair 'z', which is not in batch {BATCH}"):
        read_labels(path, "safety", BATCH, IDS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.jsonl", "{\n", r"s.jsonl, line 1 is not valid JSON \(.*\): correct it"),
        ("s.jsonl", "[1]\n", r"s.jsonl, line 1 holds no JSON object: correct it"),
        ("s.csv", "id,choice\n", r"s.csv lacks the columns batch, degree; it has: id, choice"),
        ("s.json", "{", r"s.json is not valid JSON \(.*\): export the project again, as JSON"),
        ("s.json", "{}", r"s.json holds no list of tasks: export the project as JSON, not as another format"),
        ("s.json", '[{"id": "a", "choice": "left"}]', r"s.json, task 0 lacks `data` with `batch` and `id`"),
    ],
)
def test_a_file_that_cant_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name, "safety", BATCH, IDS)


def test_skipped_tasks_of_an_export_are_no_labels(tmp_path: Path) -> None:
    tasks = export(row("a"), row("b"))
    tasks[0]["annotations"][0]["was_cancelled"] = True
    tasks[1]["annotations"][0]["completed_by"] = 3
    (tmp_path / "safety.json").write_text(json.dumps(tasks))
    labels = read_labels(tmp_path / "safety.json", "safety", BATCH, IDS)
    assert labels == Labels({"b": [Label(0, "better", (True, False), "3")]}, {}, 0)


# --- where they lie ---


def test_labels_that_are_not_there_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    batches: Any = {"helpfulness": "v1-helpfulness-1", "safety": "v1-safety-2"}
    folder = tmp_path / "v1"
    with pytest.raises(
        Waiting,
        match="^waiting for the labels of v1-helpfulness-1 and v1-safety-2, "
        f"put them at {folder}/helpfulness.jsonl and {folder}/safety.jsonl",
    ):
        find_labels(tmp_path, "v1", batches)
    write(folder / "safety.json")
    with pytest.raises(Waiting, match=f"^waiting for the labels of v1-helpfulness-1, put them at {folder}/helpfulness"):
        find_labels(tmp_path, "v1", batches)
    write(folder / "helpfulness.csv")
    assert find_labels(tmp_path, "v1", batches) == {
        "helpfulness": folder / "helpfulness.csv", "safety": folder / "safety.json",
    }  # fmt: skip
    write(folder / "safety.csv")
    with pytest.raises(ValueError, match=r"safety.csv and .*safety.json both exist: keep one of them"):
        find_labels(tmp_path, "v1", batches)
    assert find_labels(tmp_path, "v2", {}) == {}


# --- what they come to ---


def label(choice: int, degree: Any, safe: tuple[bool, bool] | None = None, annotator: str = "ann") -> Label:
    return Label(choice, degree, safe, annotator)  # type: ignore[arg-type]


def test_most_annotators_decide_with_their_middle_degree() -> None:
    first, second = label(1, "significantly", annotator="ann"), label(1, "slightly", annotator="ben")
    other = label(0, "negligibly", annotator="carla")
    for order in permutations([first, second, other]):
        assert decide(order) == Decision(1, "slightly", None, "ann ben carla")  # of two degrees the lesser
    third = label(1, "better", annotator="david")
    for order in permutations([first, second, third]):
        assert decide(order) == Decision(1, "better", None, "ann ben david")
    assert decide([first]) == Decision(1, "significantly", None, "ann")


def test_divided_annotators_decide_nothing() -> None:
    assert decide([label(0, "better"), label(1, "better")]) is None
    assert decide([]) is None


def test_an_answer_is_safe_if_most_say_so() -> None:
    seen = [label(0, "better", safe) for safe in ((True, True), (True, False), (False, False))]
    decision = decide(seen)
    assert decision is not None
    assert decision.safe == (True, False)
    two = decide(seen[:2])
    assert two is not None
    assert two.safe == (True, False)  # divided: not safe


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(sorted(DEGREES)), st.tuples(st.booleans(), st.booleans())))
)
def test_a_decision_turns_with_the_sides(said: list[tuple[int, str, tuple[bool, bool]]]) -> None:
    as_shown = decide([label(choice, degree, safe) for choice, degree, safe in said])
    turned = decide([label(1 - choice, degree, (right, left)) for choice, degree, (left, right) in said])
    if as_shown is None or turned is None:
        assert as_shown is turned
        return
    assert as_shown.safe is not None
    assert turned == (1 - as_shown.choice, as_shown.degree, as_shown.safe[::-1], as_shown.annotator)
