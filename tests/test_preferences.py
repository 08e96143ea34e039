from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from stages import Workspace, stage_here
from test_labels import write
from test_pairs import pair_of, transcript, turns

from tasks.judging.label_studio import batch_of
from tasks.judging.labels import Labels
from tasks.preferences import (
    Batch,
    Params,
    check_varied,
    preferences_of,
    read_earlier,
    read_responses,
    run,
    safety_bins,
    split,
)
from tasks.reading.contamination import plain
from tasks.reading.prompts import KINDS, Kind, Label
from tasks.running.files import write_lines
from tasks.running.stage import Stage, Waiting

REPOSITORY = Path(__file__).parent.parent
TASTES = dict.fromkeys(
    ("right", "facts", "close", "words", "well_formed", "follows", "refusal", "brevity", "harm", "safe"), 1.0
)
ANNOTATOR = {
    "tastes": TASTES, "thresholds": {"slightly": 0.1, "better": 0.5, "significantly": 1.0}, "noise": 0.0,
    "error_rate": 0.0, "safety_error_rate": 0.0,
}  # fmt: skip


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        "annotators": "files",
        "simulated": {"truth": "truth", "overlap_share": 0.5, "annotators": dict.fromkeys(("a", "b", "c"), ANNOTATOR)},
        "labels": "labels", "max_alike": 20,
        "sources": {"public": {"files": ["public.jsonl"], "format": "auto", "kind": "helpfulness", "max_pairs": None}},
        "max_malformed_share": 0.1, "validation_share": 0.3, "num_examples": 2,
    }  # fmt: skip
    return {**values, **changes}


EVALUATE = {"root": "prompts", "prompts": ["evaluation.jsonl"], "truth": None}


def stage_of(name: str = "preferences@v1", **changes: Any) -> Stage[Params]:
    return stage_here(name, Params.model_validate(values_of(**changes)))


def responses_of(round_name: str, kind: Kind, number: int) -> dict[str, Any]:
    answers = [
        {"text": f"{side} {number}", "finished": True, "num_tokens": 2, "responder": {"model": model, "temperature": t}}
        for side, model, t in (("left", "data/sft", 0.9), ("right", "data/early", 1.2))
    ]
    return {
        "id": f"{round_name}-{kind}-{number}", "kind": kind, "messages": turns(f"{round_name} {kind} {number}?"),
        "category": "x", "risk": None, "attack": None, "round": round_name, "batch": "",
        "responses": answers[::-1] if number % 2 else answers,
    }  # fmt: skip


def write_responses(round_name: str, number: int = 30) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        pairs = [responses_of(round_name, kind, n) for n in range(number)]
        batch = batch_of(round_name, kind, pairs)
        found[kind] = [{**pair, "batch": batch} for pair in pairs]
        Path("data/responses", round_name).mkdir(parents=True, exist_ok=True)
        write_lines(Path("data/responses", round_name, f"{kind}.jsonl"), found[kind])
    return found


def label_of(pair: dict[str, Any], number: int, **changes: Any) -> dict[str, Any]:
    """Varied labels: the newest model's answer is chosen but for each third pair; each fifth is unsafe."""
    newest = [response["responder"]["model"] for response in pair["responses"]].index("data/sft")
    choice = ("left", "right")[newest if number % 3 else 1 - newest]
    degree = ("significantly", "better", "slightly", "negligibly")[number % 4]
    safe = {f"{side}_safe": number % 5 > 0 or side == choice for side in ("left", "right")}
    said = {"annotator": "ann", "choice": choice, "degree": degree, **safe}
    return {"batch": pair["batch"], "id": pair["id"], **said, **changes}


def write_labels(round_name: str, pairs: dict[str, list[dict[str, Any]]]) -> None:
    Path("labels", round_name).mkdir(parents=True, exist_ok=True)
    for kind, own in pairs.items():
        write(Path("labels", round_name, f"{kind}.jsonl"), *[label_of(pair, n) for n, pair in enumerate(own)])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a round's pairs of responses, public pairs and an evaluation."""
    monkeypatch.chdir(tmp_path)
    models = {
        "newest": "data/sft",
        "earlier": "data/early",
        "samples": "none",
        "distil_from": "none",
        "ghost_attention": "data/seeds/none",
        "context_distillation": "data/seeds/none",
    }
    rounds = {"v1": {**models, "batches": "public"}, "v2": {**models, "batches": "data/preferences/v1"}}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"rounds": rounds, "evaluate": EVALUATE}, file)
    Path("public").mkdir()
    public = [{"chosen": transcript(str(n), "good"), "rejected": transcript(str(n), "bad")} for n in range(20)]
    write_lines(Path("public/public.jsonl"), public)
    Path("prompts").mkdir()
    write_lines(Path("prompts/evaluation.jsonl"), [{"id": "e", "messages": turns("Who is Ana?")}])
    Path("labels").mkdir()
    return tmp_path


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- a round ---


def test_a_round_holds_its_own_labels_and_the_public_pairs(place: Path) -> None:
    pairs = write_responses("v1")
    write_labels("v1", pairs)
    figures = run(stage_of())
    found = {pair["id"]: pair for name in ("train", "validation") for pair in lines(f"out/{name}.jsonl")}
    assert len(found) == 80
    assert lines("out/aside.jsonl") == []
    for kind, own in pairs.items():
        for number, pair in enumerate(own):
            preference, label = found[pair["id"]], label_of(pair, number)
            side = ("left", "right").index(label["choice"])
            assert preference["chosen"] == pair["responses"][side]["text"]
            assert preference["rejected"] == pair["responses"][1 - side]["text"]
            assert preference["responders"]["chosen"] == pair["responses"][side]["responder"]
            assert preference["degree"] == label["degree"]
            assert preference["chosen_safe"] == (True if kind == "safety" else None)
            assert preference["rejected_safe"] == (number % 5 > 0 if kind == "safety" else None)
            assert (preference["source"], preference["annotator"], preference["round"]) == ("files", "ann", "v1")
    assert figures["pairs_read"] == figures["train"] + figures["validation"] == 80
    assert figures["public"] == 20
    assert figures["helpfulness/newest_wins"] == figures["safety/newest_wins"] == 20 / 30
    assert figures["helpfulness/significantly"] == 8 / 30
    assert figures["helpfulness/negligibly"] == 7 / 30
    assert figures["safety/bins/chosen_safe"] == 6 / 30
    assert figures["safety/bins/both_safe"] == 24 / 30
    assert figures["safety/labels"] == 30
    degrees = pandas.read_csv("out/plots/degrees.csv").set_index("bar")
    assert degrees.loc["helpfulness: significantly", "pairs"] == 8
    examples = pandas.read_csv("record/tables/examples.csv")
    assert Counter(examples["degree"]) == dict.fromkeys(("significantly", "better", "slightly", "negligibly"), 4)


def test_no_pair_is_lost_whatever_is_wrong_with_it(place: Path) -> None:
    public = [{"chosen": transcript(str(n), "good"), "rejected": transcript(str(n), "bad")} for n in range(40)]
    public[3]["chosen"] = "no transcript"
    public[4]["rejected"] = public[4]["chosen"]
    public[5]["rejected"] = transcript("5", " ")
    public[6] = {side: text.replace("Human: 6", "Human: who is Ana") for side, text in public[6].items()}
    write_lines(Path("public/public.jsonl"), public)
    pairs = write_responses("v1")
    own = pairs["safety"]
    own[7]["responses"][1]["text"] = own[7]["responses"][0]["text"]
    own[8]["messages"] = turns("Who is Ana?")
    write_lines(Path("data/responses/v1/safety.jsonl"), own)
    rows = [label_of(pair, n) for n, pair in enumerate(own)]
    rows[1] |= {"choice": "left", "left_safe": False, "right_safe": True}
    rows[2] |= {"degree": "hugely"}
    rows.append({**rows[3], "annotator": "ben", "choice": {"left": "right", "right": "left"}[rows[3]["choice"]]})
    del rows[0]
    write_labels("v1", pairs)
    write(Path("labels/v1/safety.jsonl"), *rows)
    figures = run(stage_of())
    aside = lines("out/aside.jsonl")
    reasons = {
        "unlabelled": 1, "chosen_unsafe": 1, "faulty_label": 1, "tie": 1, "identical": 2, "evaluation_prompt": 2,
        "malformed": 1, "empty": 1,
    }  # fmt: skip
    assert Counter(each["reason"] for each in aside) == reasons
    assert {name: figures[f"aside/{name}"] for name in reasons} == reasons
    assert figures["pairs_read"] == 30 + 30 + 40
    assert len(lines("out/train.jsonl")) + len(lines("out/validation.jsonl")) + len(aside) == 100
    assert figures["safety/labels_faulty"] == 1
    assert figures["safety/only_other_safe"] == 1 / 27  # of 30 three have no decision
    left_out = next(each for each in aside if each["reason"] == "chosen_unsafe")
    assert left_out["pair"]["id"] == own[1]["id"]
    shown = pandas.read_csv("record/tables/aside.csv")
    assert set(shown["reason"]) == set(reasons)


def write_truth(pairs: dict[str, list[dict[str, Any]]]) -> None:
    """A world in which the newest model always gives the reference."""
    Path("truth").mkdir()
    known = {
        "split": "s", "category": "x", "task": "t", "check": None, "instructions": [], "num_turns": 1,
        "held_out": False, "topic": "", "attack": "", "difficulty": 0,
    }  # fmt: skip
    categories = ("borderline", *["x"] * 29)
    rows = [
        {**known, "id": pair["id"], "reference": f"left {number}", "risk": "illicit" if kind == "safety" else ""}
        | {"category": "safety" if kind == "safety" else categories[number]}
        for kind, own in pairs.items()
        for number, pair in enumerate(own)
    ]
    write_lines(Path("truth/prompts.jsonl"), rows)
    words = {"names": {}, "methods": ["fire"], "means": ["wood"], "insults": ["pig"], "max_answer_words": 9}
    Path("truth/words.json").write_text(json.dumps(words))
    Path("truth/vocabulary.txt").write_text("left\nright\n")
    write_lines(Path("truth/facts.jsonl"), [])


def test_simulated_annotators_choose_what_is_true_and_agree(place: Path) -> None:
    pairs = write_responses("v1")
    write_truth(pairs)
    figures = run(stage_of(annotators="simulated", max_alike=1000))
    assert figures["helpfulness/newest_wins"] == figures["safety/newest_wins"] == 1
    assert figures["safety/bins/both_safe"] == 1
    several = figures["helpfulness/agreement/pairs"]
    assert 0 < several < 30
    assert figures["helpfulness/labels"] == 30 + 2 * several
    assert figures["helpfulness/agreement/choice/ac1"] == figures["safety/agreement/safety/ac1"] == 1
    found = [pair for pair in lines("out/train.jsonl") if pair["source"] == "world"]
    assert {len(pair["annotator"].split()) for pair in found} == {1, 3}
    found += [pair for pair in lines("out/validation.jsonl") if pair["source"] == "world"]
    safe = {pair["id"]: (pair["chosen_safe"], pair["rejected_safe"]) for pair in found}
    labelled = {pair["id"] for pair in [*pairs["safety"], pairs["helpfulness"][0]]}  # the first one looks unsafe
    assert safe == {name: (True, True) if name in labelled else (None, None) for name in safe}
    with pytest.raises(ValueError, match=r"have the degree `better`: have annotators use all four"):
        run(stage_of(annotators="simulated"))


def test_the_same_inputs_give_the_same_bytes(place: Path) -> None:
    write_labels("v1", write_responses("v1"))
    run(stage_of())
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    run(stage_of())
    assert before == {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    assert len(before) == 3


def test_a_round_without_annotators_has_public_pairs_alone(place: Path) -> None:
    write_responses("v1", 3)
    figures = run(stage_of(annotators="dataset"))
    assert figures["train"] + figures["validation"] == figures["public"] == 20
    assert figures["aside/unlabelled"] == 6
    write_responses("v1", 0)
    assert run(stage_of(annotators="files"))["aside"] == 0  # nothing to label, nothing to wait for


def test_pairs_that_leave_nothing_to_learn_from_stop_the_stage(place: Path) -> None:
    write_responses("v1", 0)
    write_lines(Path("public/public.jsonl"), lines("public/public.jsonl")[:1])
    with pytest.raises(ValueError, match=r"pairs are left to learn from and \d to validate with, of 1 read, 0 of them"):
        run(stage_of())


def test_responses_that_are_missing_are_named(place: Path) -> None:
    with pytest.raises(ValueError, match=r"v1/helpfulness.jsonl is missing: run stage `responses@v1`"):
        read_responses(Path("data/responses/v1"))


# --- rounds one after another ---


def test_a_later_round_takes_over_the_earlier_ones_on_their_sides(place: Path) -> None:
    write_labels("v1", write_responses("v1"))
    run(stage_of())
    before = {name: lines(f"out/{name}.jsonl") for name in ("train", "validation")}
    Path("data/preferences").mkdir()
    Path("out").rename("data/preferences/v1")
    write_labels("v2", write_responses("v2"))
    figures = run(stage_of("preferences@v2"))
    after = {name: lines(f"out/{name}.jsonl") for name in ("train", "validation")}
    for name, pairs in before.items():
        assert after[name][: len(pairs)] == pairs
        assert {pair["round"] for pair in after[name][len(pairs) :]} == {"v2"}
    assert figures["earlier"] == 80
    assert figures["helpfulness/pairs"] == 30  # of this round
    assert figures["train"] + figures["validation"] == 140


pairs_of_any_kind = st.lists(
    st.builds(
        lambda opening, more: pair_of(turns(opening, "Hi", more)), st.sampled_from("abcdefgh"), st.text(max_size=2)
    )
)


@given(pairs_of_any_kind, pairs_of_any_kind, st.floats(0.05, 0.95), st.integers(0, 9))
def test_no_prompt_is_on_both_sides_and_a_pair_stays_on_its_own(
    first: list[Any], second: list[Any], share: float, seed: int
) -> None:
    train, validation = split(first, share, seed)
    assert not {plain(pair["messages"]) for pair in train} & {plain(pair["messages"]) for pair in validation}
    assert len(train) + len(validation) == len(first)
    again = split([*train, *validation, *second], share, seed)
    assert again[0][: len(train)] == train
    assert again[1][: len(validation)] == validation


def test_about_the_share_asked_for_is_held_out() -> None:
    pairs = [pair_of(turns(str(number))) for number in range(2000)]
    assert 0.17 < len(split(pairs, 0.2, seed=1)[1]) / 2000 < 0.23


def test_a_directory_without_a_round_holds_public_pairs(place: Path) -> None:
    earlier, public, refused = read_earlier(Path("public"), Params.model_validate(values_of()))
    assert (len(earlier), len(public), len(refused)) == (0, 20, 0)


def test_public_files_may_be_called_train_and_validation(place: Path) -> None:
    rows = [{"chosen": transcript("a", "b"), "rejected": transcript("a", "c")}]
    for name in ("train", "validation"):
        write_lines(Path("public", f"{name}.jsonl"), rows)
    sources = {"public": {**values_of()["sources"]["public"], "files": ["train.jsonl", "validation.jsonl"]}}
    earlier, public, _ = read_earlier(Path("public"), Params.model_validate(values_of(sources=sources)))
    assert (len(earlier), len(public)) == (0, 2)


def test_batches_that_are_no_directory_are_named(place: Path) -> None:
    with pytest.raises(ValueError, match=r"params.yaml: `rounds.*.batches` is gone, which is not a directory"):
        read_earlier(Path("gone"), Params.model_validate(values_of()))


# --- labels all one way ---


def batch_with(labels: list[Label]) -> Batch:
    by_pair = {str(number): [label] for number, label in enumerate(labels)}
    return Batch("safety", "v1-safety-0", [], Labels(by_pair, {}, 0))


def test_a_batch_with_all_labels_one_way_stops_the_stage() -> None:
    varied = [Label(number % 2, ("better", "slightly")[number % 3 % 2], None, "ann") for number in range(40)]  # type: ignore[arg-type]
    check_varied(batch_with(varied), 20)
    left = [label._replace(choice=0) for label in varied]
    with pytest.raises(ValueError, match=r"batch v1-safety-0: all 40 labels choose the left answer, although the"):
        check_varied(batch_with(left), 20)
    right = [label._replace(choice=1) for label in varied]
    with pytest.raises(ValueError, match=r"all 40 labels choose the right answer"):
        check_varied(batch_with(right), 20)
    with pytest.raises(ValueError, match=r"batch v1-safety-0: all 40 labels have the degree `better`"):
        check_varied(batch_with([label._replace(degree="better") for label in varied]), 20)
    check_varied(batch_with(left[:20]), 20)


def test_bins_leave_out_pairs_of_which_only_the_other_answer_is_safe() -> None:
    said = [(True, False)] * 2 + [(True, True)] * 5 + [(False, False)] * 1 + [(False, True)] * 2
    own = [pair_of(chosen_safe=chosen, rejected_safe=rejected) for chosen, rejected in said]
    assert safety_bins([*own, pair_of(chosen_safe=None, rejected_safe=None)]) == {
        "safety/bins/chosen_safe": 2 / 8,
        "safety/bins/both_safe": 5 / 8,
        "safety/bins/both_unsafe": 1 / 8,
        "safety/only_other_safe": 2 / 10,
    }
    assert safety_bins([]) == {}
    borderline = {**pair_of(chosen_safe=True, rejected_safe=False), "kind": "helpfulness"}
    assert safety_bins([*own, borderline]) == safety_bins(own)  # type: ignore[list-item]


def test_a_decision_tells_the_safety_of_the_answers_by_their_sides(place: Path) -> None:
    pair: Any = responses_of("v1", "safety", 0)
    labels = Labels({pair["id"]: [Label(1, "better", (False, True), "ann")]}, {}, 0)
    ((preference,), aside) = preferences_of(Batch("safety", "v1-safety-0", [pair], labels), "files")
    assert aside == []
    assert (preference["chosen"], preference["chosen_safe"], preference["rejected_safe"]) == ("right 0", True, False)


# --- as the pipeline starts it ---


def test_preferences_import_neither_torch_nor_transformers() -> None:
    program = "import sys, tasks.preferences; print(sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ast.literal_eval(result.stdout) == []


def test_a_round_whose_labels_are_not_there_waits(place: Path) -> None:
    pairs = write_responses("v1")
    with pytest.raises(
        Waiting, match=r"^waiting for the labels of v1-helpfulness-.* and v1-safety-.*, put them at labels/v1"
    ):
        run(stage_of())
    write_labels("v1", pairs)
    assert run(stage_of())["aside"] == 0


DVC_STAGE = f"""\
stages:
  preferences:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.preferences ${{key}}
      deps:
      - data/responses/${{key}}
      - ${{item.batches}}
      - ${{preferences.labels}}
      params:
      - preferences
      outs:
      - data/preferences/${{key}}
"""


@pytest.mark.slow
def test_waiting_ends_with_its_line_and_status_75_and_the_next_run_goes_on(place: Path) -> None:
    pairs = write_responses("v1")
    rounds = {"v1": YAML(typ="safe").load(Path("params.yaml"))["rounds"]["v1"]}
    environment = Workspace(
        Path(), "preferences v1", DVC_STAGE, rounds=rounds, evaluate=EVALUATE, preferences=values_of()
    ).environment
    command = [sys.executable, "-m", "tasks.preferences", "v1"]
    waits = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert waits.returncode == 75
    (line,) = [line for line in waits.stderr.splitlines() if "waiting" in line]
    assert re.fullmatch(
        r"preferences@v1: waiting for the labels of v1-helpfulness-\w+ and v1-safety-\w+, put them .*", line
    )
    assert "Traceback" not in waits.stderr
    (record,) = Path(".runs/preferences/v1").glob("*/run.json")
    run_record = json.loads(record.read_text())
    assert (run_record["status"], run_record["error"]) == ("KILLED", line.removeprefix("preferences@v1: "))
    assert Path(".scratch/preferences/v1/waiting.txt").read_text().strip() == run_record["error"]
    assert not Path("data/preferences").exists()
    write_labels("v1", pairs)
    dvc = [sys.executable, "-m", "dvc", "repro", "-q", "preferences@v1"]
    goes_on = subprocess.run(dvc, capture_output=True, text=True, check=False, env=environment)
    assert goes_on.returncode == 0, goes_on.stderr
    assert json.loads(Path("data/preferences/v1/metrics.json").read_text())["aside"] == 0
    assert not list(Path(".scratch/preferences/v1").glob("*/output"))
