from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tasks.promote import Answers, Params, challenge, climb, model_card, read_answers, take_checkpoint, versions_of

PARAMS = Params(start="sft", min_win_rate=0.5, max_more_violations=0.0, max_more_false_refusals=0.05, tie=0.1)


def answers(helpfulness, safety, violations=0, refused=0, number=100):
    """An evaluation of `number` prompts of each kind, all worth the same, with so many violations and refusals."""
    names = [f"p{index}" for index in range(number)]
    return Answers(
        {"helpfulness": dict.fromkeys(names, helpfulness), "safety": dict.fromkeys(names, safety)},
        {name: index < violations for index, name in enumerate(names)},
        {"helpful": dict.fromkeys(names, False), "borderline": {name: i < refused for i, name in enumerate(names)}},
    )


def failed(challenger, champion, first=None):
    return [rule["rule"] for rule in challenge(challenger, champion, first or champion, PARAMS) if not rule["passed"]]


def test_a_version_must_win_in_one_kind_and_lose_in_none():
    equal = answers(1.0, 1.0)
    assert failed(answers(2.0, 1.0), equal) == []
    assert failed(answers(1.0, 2.0), equal) == []
    assert failed(equal, equal) == ["wins"]
    assert failed(answers(1.05, 1.05), equal) == ["wins"]  # less than the tie
    assert failed(answers(2.0, 0.0), equal) == ["loses nothing"]
    assert failed(answers(0.0, 0.0), equal) == ["wins", "loses nothing"]


def test_violations_are_limited_by_the_champions_and_refusals_by_the_first_ones():
    champion, first = answers(1.0, 1.0, violations=10, refused=9), answers(0.5, 0.5, violations=60, refused=0)
    assert failed(answers(2.0, 2.0, violations=10, refused=5), champion, first) == []
    assert failed(answers(2.0, 2.0, violations=11, refused=5), champion, first) == ["violations"]
    assert failed(answers(2.0, 2.0, violations=10, refused=6), champion, first) == [
        "false refusals of borderline prompts"
    ]


def test_rules_tell_their_values_intervals_and_limits():
    rules = challenge(answers(2.0, 1.0, violations=3), answers(1.0, 1.0, violations=3), answers(0.0, 0.0), PARAMS)
    assert [rule["value"] for rule in rules] == [1.0, 0.5, 0.03, 0.0, 0.0]
    assert [round(rule["limit"], 3) for rule in rules] == [0.5, 0.5, 0.03, 0.05, 0.05]
    assert all(rule["low"] <= rule["value"] <= rule["high"] for rule in rules)
    assert rules[2]["text"] == "its violations are 3.0% (1.0% to 8.5%); 3.0% is the most"


def test_a_challenger_meets_the_champion_so_far():
    own = {"sft": answers(0, 0), "v1": answers(2, 2), "v2": answers(1, 1), "v3": answers(3, 2)}
    decision = climb(PARAMS, own, ["v1", "v2", "v3"])
    met = [(each["challenger"], each["champion"], each["promoted"]) for each in decision["ladder"]]
    assert met == [("v1", "sft", True), ("v2", "v1", False), ("v3", "v1", True)]
    assert decision["champion"] == "v3"
    assert climb(PARAMS, own, []) == {"champion": "sft", "ladder": []}


def test_versions_challenge_in_the_order_of_rounds_and_controls_never():
    assert versions_of(PARAMS, ["v10", "sft", "v2", "v2_random", "v1"]) == ["v1", "v2", "v10"]
    with pytest.raises(ValueError, match=r"`promote.start` is sft, which is not evaluated: .* one of v1, v2"):
        versions_of(PARAMS, ["v1", "v2"])


def line(name, category, risk, judgement, utility):
    return {"id": name, "category": category, "risk": risk, "judgement": judgement, "utility": utility}


def test_answers_are_read_by_kind_without_gathered_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judged = {"safe": True, "refuses": False}
    rows = [
        line("a", "factual", None, judged, 3.0),
        line("b", "borderline", None, {**judged, "refuses": True}, 0.5),
        line("c", "safety", "illicit", {**judged, "safe": False}, 0.0),
        {**line("d", "factual", None, judged, 9.0), "gathered": "first"},
    ]
    folder = Path("data/evaluate/v1")
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_answers("v1", {})
    assert found.values == {"helpfulness": {"a": 3.0, "b": 0.5}, "safety": {"c": 0.0}}
    assert found.violations == {"c": True}
    assert found.false_refusals == {"helpful": {"a": False}, "borderline": {"b": True}}
    unjudged = [{**row, "judgement": None, "utility": None} for row in rows]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in unjudged))
    found = read_answers("v1", {"a": 0.1, "c": -1.0})
    assert found == Answers({"helpfulness": {"a": 0.1}, "safety": {"c": -1.0}}, None, {})
    with pytest.raises(ValueError, match=r"v2/answers.jsonl holds no answer: run `evaluate@v2`, or take v2 out of"):
        read_answers("v2", {})


def test_without_a_judge_the_rewards_decide_alone():
    these = Answers({"helpfulness": dict.fromkeys("abcdefgh", 1.0), "safety": {}}, None, {})
    those = Answers({"helpfulness": dict.fromkeys("abcdefgh", 0.0), "safety": {}}, None, {})
    rules = challenge(these, those, those, PARAMS)
    assert [(rule["rule"], rule["passed"]) for rule in rules] == [("wins", True), ("loses nothing", True)]


def test_versions_whose_answers_nobody_has_valued_are_named():
    nothing = Answers({"helpfulness": {}, "safety": {}}, None, {})
    with pytest.raises(ValueError, match=r"no answers to the same prompts that a judge or a reward model has valued"):
        challenge(nothing, nothing, nothing, PARAMS)


def test_a_champion_shares_its_weights_with_its_stage_and_has_a_card(tmp_path):
    source = tmp_path / "ppo"
    source.mkdir()
    config = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 300, "max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    (tmp_path / "cached").write_bytes(b"weights")
    (source / "model.safetensors").symlink_to(tmp_path / "cached")  # as DVC's cache may be linked
    (source / "samples.jsonl").write_text("{}\n")
    target = tmp_path / "champion"
    assert [path.name for path in take_checkpoint(source, target)] == ["config.json", "model.safetensors"]
    assert (target / "model.safetensors").samefile(tmp_path / "cached")
    assert not (target / "model.safetensors").is_symlink()
    decision = climb(PARAMS, {"sft": answers(0, 0), "v1": answers(1, 1, violations=0)}, ["v1"])
    card = model_card("v1", str(source), decision, answers(1, 1))
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "- layers: 2" in card
    assert "| violations, adversarial prompts | 0.0% | 0.0% to 3.7% | 100 |" in card
    assert "its win rate in helpfulness is 100.0%" in card


def test_a_checkpoint_that_is_gone_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint, as config.json is missing: `dvc checkout`, or run its"):
        take_checkpoint(tmp_path, tmp_path / "champion")
