from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import join_alone, train_tokenizer
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from stages import Workspace, stage_here
from test_evaluate import write_prompts
from test_rejection_sampling import (  # noqa: F401 - a fixture
    NOTHING,
    QUESTIONS,
    annotators,
    asked,
    candidate,
    models,
    prompt_truth,
    write_chat,
    write_truth,
)

from model.network.checkpoint import open_checkpoint
from model.sampling.sampler import Sampling, sample
from model.scoring.reward import open_reward, score
from model.text.dialogue import decode_answer, encode_dialogue, encode_prompt
from tasks.context_distillation.__main__ import Asked, Params, choose, run
from tasks.context_distillation.preprompts import (
    Preprompt,
    Preprompts,
    draw_preprompts,
    read_preprompts,
    with_preprompt,
)
from tasks.context_distillation.reporting import Distilled, report, report_truth
from tasks.judging.calibration import Line
from tasks.judging.scales import Fitted
from tasks.reading.prompts import KINDS, Prompt
from tasks.reading.rounds import JOINED
from tasks.reading.shares import at_most, share_of
from tasks.running.digests import number_of
from tasks.running.files import read_lines, write_lines
from tasks.running.names import is_metric_name
from tasks.running.params import parse_section
from tasks.running.stage import Stage
from tasks.world.annotators import Annotators
from tasks.world.judge import read_truth

CPU = torch.device("cpu")
ROWS = [
    {**asked(number, "safety"), "messages": [{"role": "user", "content": f"walk {number}?"}]} for number in range(24)
]
OUTPUTS = ("dialogues.jsonl", "samples.jsonl", "too_long.jsonl")
PREPROMPTS = """\
adjectives = ["hill", "w", "over"]
frames = ["the {first}", "{first} {second}"]
[templates.illicit]
wordings = ["who"]
"""


# --- a small world ---


def write_world(root: Path, models: Path) -> None:  # noqa: F811
    shutil.copytree(models / "chat", root / "chat")
    shutil.copytree(models / "data", root / "data")
    write_prompts(root / "prompts/safety.jsonl", ROWS)
    write_prompts(root / "evaluation/asked.jsonl", [{**asked(99), "id": "e"}])
    (root / "preprompts.toml").write_text(PREPROMPTS)
    write_params(root)


def write_params(root: Path, *names: str) -> None:
    own = {"newest": "chat", "earlier": "early", "batches": "pairs", "samples": NOTHING, "distil_from": NOTHING}
    own |= dict.fromkeys(JOINED, NOTHING)
    sections = {
        "rounds": dict.fromkeys(names or ("v1",), own),
        "evaluate": {"root": "evaluation", "prompts": ["asked.jsonl"]},
    }
    with (root / "params.yaml").open("w") as file:
        YAML().dump(json.loads(json.dumps(sections)), file)


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    join_alone()
    write_world(tmp_path, models)
    return tmp_path


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        "rounds": {"v1": {"newest": "chat", "earlier": NOTHING}}, "prompts": "prompts/safety.jsonl", "max_prompts": 6,
        "num_held_out_prompts": 2, "num_rounds": 2, "preprompts": "preprompts.toml", "num_preprompts": 2,
        "template_share": 0.5, "num_samples": 2, "gate": True, "temperature": 0.9, "top_p": 1.0, "top_k": 0,
        "max_new_tokens": 8, "truth": None, "precision": "fp32", "max_rows": 8, "tokens_at_once": 200, "save_every": 4,
    }  # fmt: skip
    return {**values, **changes}


def stage_of(fresh: bool = True, name: str = "context_distillation@v1", **changes: Any) -> Stage[Params]:
    return stage_here(name, Params.model_validate(values_of(**changes)), fresh)


def lines_of(name: str) -> list[dict[str, Any]]:
    return read_lines(Path("out", name))


def outputs() -> dict[str, bytes]:
    return {name: Path("out", name).read_bytes() for name in OUTPUTS}


def own_prompts() -> list[Prompt]:
    """The adversarial prompts that round v1 may ask."""
    prompts = [Prompt(row["id"], "safety", row["messages"], row["risk"], row["attack"], None) for row in ROWS]
    share = share_of(prompts, 0, 2)
    held_out = {prompt.id for prompt in at_most(share, 2, "search")}
    return [prompt for prompt in share if prompt.id not in held_out]


# --- a whole run ---


def test_answers_are_drawn_with_preprompts_and_scored_without(place: Path) -> None:
    figures = run(stage_of())
    model, tokenizer = open_checkpoint(Path("chat"), "fp32", CPU)
    rewards = {kind: open_reward(Path(f"data/reward_{kind}/v1"), "fp32", CPU)[0] for kind in KINDS}
    samples = lines_of("samples.jsonl")
    assert figures["prompts"] == len(samples) == 6

    def drawn(identity: str, messages: Any, num_samples: int) -> list[tuple[str, bool]]:
        seeds = [number_of(f"1 rejection v1 {identity} 0.9")]
        how = Sampling(temperature=0.9, top_p=1, top_k=0, max_new_tokens=8)
        prompt = encode_prompt(messages, tokenizer)
        (found,) = sample(
            model, [prompt], how, num_samples=num_samples, eos_id=2, seeds=seeds, max_rows=9, description=None
        )
        return list(dict.fromkeys((decode_answer(each.ids, tokenizer), each.finished) for each in found))

    for line in samples:
        answers = [line["plain"], *line["candidates"]]
        assert [(line["plain"]["text"], line["plain"]["finished"])] == drawn(line["id"], line["messages"], 1)
        for number, preprompt in enumerate(line["preprompts"]):
            messages = [{"role": "system", "content": preprompt["text"]}, *line["messages"]]
            own = [(each["text"], each["finished"]) for each in line["candidates"] if each["preprompt"] == number]
            assert own == drawn(f"{line['id']} {number}", messages, 2)
        for each in answers:
            text = each["text"].strip()
            ids = [*tokenizer.encode(f"[INST] {line['messages'][0]['content']} [/INST] {text} ", bos=True, eos=True)]
            for kind, reward in rewards.items():
                assert each[kind] == pytest.approx(score(reward, [ids], 10**6)[0], abs=1e-4)
    assert figures["samples"] == 6 * 2 * 2


def test_what_is_learnt_is_the_answer_and_nothing_of_a_preprompt_is_read(place: Path) -> None:
    figures = run(stage_of())
    _, tokenizer = open_checkpoint(Path("chat"), "fp32", CPU)
    samples = {line["id"]: line for line in lines_of("samples.jsonl")}
    dialogues = lines_of("dialogues.jsonl")
    assert 0 < len(dialogues) == figures["kept"] == figures["dialogues"]
    assert [each["id"] for each in dialogues] == [line["id"] for line in samples.values() if line["kept"]]
    for dialogue in dialogues:
        line = samples[dialogue["id"]]
        text = line["candidates"][line["best"]]["text"]
        answer = {"role": "assistant", "content": text}
        assert dialogue == {
            "id": line["id"], "messages": [*line["messages"], answer], "category": "safety", "safety": True,
            "source": "v1", "kind": "safety",
        }  # fmt: skip
        ids, is_learnt = encode_dialogue(dialogue["messages"], tokenizer, "last")
        read = [token for token, learnt in zip(ids, is_learnt, strict=True) if not learnt]
        learnt = [token for token, learnt in zip(ids, is_learnt, strict=True) if learnt]
        assert tokenizer.decode(read) == f"[INST] {line['messages'][0]['content']} [/INST]"
        assert tokenizer.decode(learnt).strip() == text and learnt[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in learnt[:-1]


def test_the_safest_answer_is_kept_if_it_is_safer_than_the_plain_one(place: Path) -> None:
    run(stage_of())
    gated = lines_of("samples.jsonl")
    assert {line["kept"] for line in gated} == {True, False}
    for line in gated:
        possible = [n for n, each in enumerate(line["candidates"]) if each["finished"] and each["text"]]
        if not possible:
            assert "best" not in line and not line["kept"]
            continue
        assert line["best"] == max(possible, key=lambda n: line["candidates"][n]["safety"])
        assert line["kept"] == (line["candidates"][line["best"]]["reward"] > line["plain"]["reward"])
    figures = run(stage_of(gate=False))
    for before, line in zip(gated, lines_of("samples.jsonl"), strict=True):
        assert line == {**before, "kept": "best" in line}
    assert figures["kept"] == figures["answered"] > sum(line["kept"] for line in gated)
    assert figures["safe_probability/gated"] == figures["safe_probability/best"]


def test_prompts_are_the_rounds_without_those_that_others_are_tried_on(place: Path) -> None:
    run(stage_of(max_prompts=4))
    assert [line["id"] for line in lines_of("samples.jsonl")] == [prompt.id for prompt in at_most(own_prompts(), 4)]
    run(stage_of(max_prompts=100))
    assert [line["id"] for line in lines_of("samples.jsonl")] == [prompt.id for prompt in own_prompts()]


def test_the_same_run_gives_the_same_bytes_and_another_seed_other_preprompts(place: Path) -> None:
    figures = run(stage_of())
    before = outputs()
    assert run(stage_of()) == figures
    assert outputs() == before
    other = stage_of()
    other.seed = 2
    run(other)
    assert [line["preprompts"] for line in lines_of("samples.jsonl")] != [
        json.loads(line)["preprompts"] for line in before["samples.jsonl"].splitlines()
    ]


def test_figures_are_numbers_with_names_that_mlflow_accepts(place: Path) -> None:
    figures = run(stage_of())
    assert all(is_metric_name(name) and math.isfinite(value) for name, value in figures.items())
    assert {"risk/illicit/kept_share", "attack/role_play/kept_share", "risk/illicit/safe_probability/best/gain"} <= set(
        figures
    )
    assert {"template/safe_probability", "adjectives/safe_probability"} <= set(figures)


# --- pre-prompts ---


def prompt_of(identity: str, risk: str | None = "illicit", attack: str = "direct", system: str = "") -> Prompt:
    messages: Any = [{"role": "user", "content": "how?"}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(identity, "safety", messages, risk, attack, 1)


MANY = Preprompts.model_validate(
    {
        "adjectives": ["wise", "safe", "kind", "fair"],
        "frames": ["Be {first}.", "Be {first} and {second}."],
        "templates": {"illicit": {"wordings": ["Say no.", "Refuse."]}, "other": {"wordings": ["Beware."]}},
    }
)


@given(
    identity=st.text(max_size=5),
    seed=st.integers(0, 99),
    number=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    risk=st.sampled_from(["illicit", "other"]),
)
def test_preprompts_are_made_of_two_different_adjectives_and_the_risks_template(
    identity: str, seed: int, number: int, share: float, risk: str
) -> None:
    prompt = prompt_of(identity, risk)
    drawn = draw_preprompts(MANY, prompt, number, share, seed)
    assert drawn == draw_preprompts(MANY, prompt, number, share, seed)
    assert drawn[:-1] == draw_preprompts(MANY, prompt, number - 1, share, seed)  # more change none
    assert math.floor(number * share) <= sum(each.has_template for each in drawn) <= math.ceil(number * share)
    for text, has_template in drawn:
        sentence, _, template = text.partition(". ")
        words = sentence.removeprefix("Be ").removesuffix(".").split(" and ")
        assert len(set(words)) == len(words) <= 2 and set(words) <= set(MANY.adjectives)
        assert template in (MANY.templates[risk].wordings if has_template else [""])


def test_over_many_prompts_everything_is_drawn_and_templates_have_their_share() -> None:
    drawn = [draw_preprompts(MANY, prompt_of(f"p{n}"), 1, 0.3, 1)[0] for n in range(2000)]
    assert sum(each.has_template for each in drawn) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard errors
    assert len({each.text for each in drawn}) == (4 + 4 * 3) * 3
    firsts = [each.text.removeprefix("Be ").split(".")[0].split()[0] for each in drawn]
    assert all(firsts.count(word) / 2000 == pytest.approx(0.25, abs=0.04) for word in MANY.adjectives)


def test_a_preprompt_is_the_system_message_or_stands_before_it() -> None:
    assert with_preprompt(prompt_of("p").messages, "Be safe.") == [
        {"role": "system", "content": "Be safe."}, {"role": "user", "content": "how?"},
    ]  # fmt: skip
    prompt = prompt_of("p", system="Answer in one word.")
    assert with_preprompt(prompt.messages, "Be safe.") == [
        {"role": "system", "content": "Be safe.\nAnswer in one word."}, {"role": "user", "content": "how?"},
    ]  # fmt: skip
    assert prompt.messages[0]["content"] == "Answer in one word."


def test_the_projects_own_preprompts_have_a_template_for_each_risk_of_the_default_world() -> None:
    found = read_preprompts(Path(__file__).parent.parent / "data/seeds/safety/preprompts.toml")
    assert set(found.templates) == {"illicit_criminal", "hateful_harmful", "unqualified_advice"}
    assert not [adjective for adjective in found.adjectives if adjective[0] in "aeiouh"]  # `a` stands before them


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adjectives = [", r"preprompts.toml is not valid TOML: "),
        ("", r"preprompts.toml: `adjectives`: Field required"),
        (PREPROMPTS.replace('["hill", "w", "over"]', "[]"), r"`adjectives`: List should have at least 1 item"),
        (PREPROMPTS.replace("over", "hill"), r"`adjectives` has one twice: hill, w, hill"),
        (PREPROMPTS.replace('["hill", "w", "over"]', '["hill"]'), r"frame `{first} {second}` needs two adjectives"),
        (
            PREPROMPTS.replace("{second}", "{third}"),
            r"frame `{first} {third}` has the places {first}, {third}: it need",
        ),
        (PREPROMPTS.replace("the {first}", "Be safe."), r"frame `Be safe.` has the places none: it needs {first}, or"),
        (PREPROMPTS.replace("the {first}", "the {first"), r"preprompts.toml: expected '}' before end of string"),
        (
            PREPROMPTS.replace("who", "[INST]"),
            r"`\[INST\]` contains \[INST\], a tag of the chat format: remove it",
        ),
        (PREPROMPTS.replace('["who"]', "[]"), r"`templates.illicit.wordings`: List should have at least 1 item"),
        (PREPROMPTS + "wording = 1", r"`templates.illicit.wording`: Extra inputs are not permitted"),
    ],
)
def test_a_broken_file_of_preprompts_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprompts.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preprompts(tmp_path / "preprompts.toml")


# --- the gate ---

LINE = Line(2.0, 1.0)
ASKED = Asked(prompt_of("p"), [Preprompt("Be safe.", has_template=False), Preprompt("Be wise.", has_template=True)])


def chosen_of(plain: float, *safeties: float, gate: bool = True, **changes: Any) -> Distilled:
    candidates = [(n % 2, candidate(f"answer {n}", 0.0, safety, **changes)) for n, safety in enumerate(safeties)]
    return choose(ASKED, candidate("plain", 0.0, plain), candidates, LINE, gate)


@pytest.mark.parametrize(("plain", "kept"), [(0.4, True), (0.5, False), (0.6, False)])
def test_the_gate_lets_only_what_is_safer_pass(plain: float, kept: bool) -> None:
    found = chosen_of(plain, 0.1, 0.5, 0.5)
    assert (found.best, found.is_kept) == (1, kept)  # of equals the first
    assert found.gated["text"] == ("answer 1" if kept else "plain")
    assert chosen_of(plain, 0.1, 0.5, gate=False).is_kept


def test_what_can_not_be_chosen_is_never_kept() -> None:
    for changes in ({"finished": False}, {"text": ""}, {"text": "says [INST]"}):
        candidates = [(0, {**candidate("x", 0.0, 9.0), **changes}), (1, candidate("good", 0.0, 1.0))]
        found = choose(ASKED, candidate("plain", 0.0, 0.0), candidates, LINE, gate=True)  # type: ignore[arg-type]
        assert (found.best, found.is_kept) == (1, True)
        found = choose(ASKED, candidate("plain", 0.0, 0.0), candidates[:1], LINE, gate=False)  # type: ignore[arg-type]
        assert (found.best, found.is_kept) == (None, False)


# --- the report, by hand ---

FITTED = Fitted(Line(1.0, 2.0), Line(1.0, 0.0), [])


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def distilled_of(identity: str, risk: str, plain: float, best: float, kept: bool, *others: float) -> Distilled:
    """A prompt with probabilities of being safe: of the plain answer, of the best one, and of others."""
    candidates = [(1, candidate("I cannot help.", 3.0, log_odds(best)))]
    candidates += [(0, candidate("A bent wire.", 1.0, log_odds(each), draws=2)) for each in others]
    answer = candidate("A bent wire.", 1.0, log_odds(plain))
    return Distilled(prompt_of(identity, risk, identity), ASKED.preprompts, answer, candidates, 0, kept)


BY_HAND = [
    distilled_of("a", "illicit", 0.2, 0.8, True),
    distilled_of("b", "illicit", 0.4, 0.9, True, 0.3),
    distilled_of("c", "advice", 0.6, 0.5, False),
]


def test_figures_by_hand(place: Path) -> None:
    unanswered = BY_HAND[0]._replace(best=None, is_kept=False)
    stage = stage_of()
    figures = report(stage, [*BY_HAND, unanswered], FITTED)
    assert (figures["prompts"], figures["answered"], figures["kept"], figures["samples"]) == (4, 3, 2, 6)
    assert figures["kept_share"] == 2 / 4
    assert (figures["risk/illicit/kept_share"], figures["risk/advice/kept_share"]) == (2 / 3, 0)
    assert (figures["attack/a/kept_share"], figures["attack/b/kept_share"], figures["attack/c/kept_share"]) == (
        0.5,
        1,
        0,
    )
    assert figures["safe_probability/plain"] == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    assert figures["safe_probability/preprompted"] == pytest.approx((0.8 + (0.9 + 2 * 0.3) / 3 + 0.5) / 3)
    assert figures["safe_probability/best"] == pytest.approx((0.8 + 0.9 + 0.5) / 3)
    assert figures["safe_probability/gated"] == pytest.approx((0.8 + 0.9 + 0.6) / 3)
    gain, names = "safe_probability/best/gain", ("", "/low", "/high")
    # 0.6, 0.5 and -0.1: standard deviation 0.378594, Student's 97.5% point of 2 degrees of freedom is 4.302653
    reach = 4.302653 * 0.378594 / 3**0.5
    assert [figures[gain + name] for name in names] == pytest.approx([1 / 3, 1 / 3 - reach, 1 / 3 + reach], abs=1e-5)
    # 0.6 and 0.5: standard deviation 0.0707107, 97.5% point of 1 degree of freedom 12.7062
    reach = 12.7062 * 0.0707107 / 2**0.5
    assert [figures[f"risk/illicit/{gain}{name}"] for name in names] == pytest.approx(
        [0.55, 0.55 - reach, 0.55 + reach], abs=1e-5
    )
    assert figures[f"risk/advice/{gain}"] == pytest.approx(-0.1)
    assert f"risk/advice/{gain}/low" not in figures  # one prompt has no interval
    assert figures["risk/advice/safe_probability/gated/gain"] == 0
    assert figures["helpfulness/plain"] == 3
    assert figures["helpfulness/best"] == 5
    assert figures["helpfulness/gated"] == pytest.approx((5 + 5 + 3) / 3)
    # of all four prompts: the template draws the best answers, adjectives alone the other one, twice
    assert figures["template/safe_probability"] == pytest.approx((0.8 + 0.9 + 0.5 + 0.8) / 4)
    assert figures["adjectives/safe_probability"] == pytest.approx(0.3)
    bars = pandas.read_csv("out/plots/safe_probability.csv").set_index("answers")
    assert bars.loc["risk illicit, plain", "value"] == pytest.approx(0.3)
    assert list(bars.index[:4]) == ["all, plain", "all, preprompted", "all, best", "all, gated"]
    kept = pandas.read_csv("out/plots/kept.csv").set_index("prompts")
    assert kept.loc["risk illicit", ["value", "count"]].tolist() == pytest.approx([2 / 3, 3])


def test_what_the_judge_says_by_hand(place: Path) -> None:
    write_truth([prompt_truth(name, "safety", risk="illicit") for name in "abc"])
    known = Annotators.model_validate(annotators(1.0, 1.0, 1.0)).annotators
    figures = report_truth(stage_of(), BY_HAND, read_truth(Path("truth")), known)
    assert figures["judged_safe/plain"] == 0  # all plain answers name the method
    assert figures["judged_safe/preprompted"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert figures["judged_safe/best"] == 1
    assert figures["judged_safe/gated"] == pytest.approx(2 / 3)
    assert figures["judged_safe/kept"] == figures["judged_safe/best/gain"] == 1
    assert figures["risk/advice/judged_safe/gated/gain"] == 0
    assert (figures["judged_refused/plain"], figures["judged_refused/best"]) == (0, 1)
    # 2.5 for a refusal, which is due and safe, and 0 for a method
    assert (figures["judged_utility/plain"], figures["judged_utility/best"]) == (0, 2.5)
    # none of two: at most z^2 / (2 + z^2) less than 1, by Wilson
    assert figures["judged_safe/kept/low"] == pytest.approx(1 - 3.8415 / 5.8415, abs=1e-4)


def test_the_truth_changes_no_choice(place: Path) -> None:
    figures = run(stage_of())
    before = outputs()
    write_truth([prompt_truth(row["id"], "safety", risk="illicit") for row in ROWS])
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    with Path("params.yaml").open("w") as file:
        YAML().dump({**params, "preferences": {"simulated": annotators(1.0, 1.0, 1.0)}}, file)
    with_truth = run(stage_of(truth="truth"))
    assert outputs() == before
    assert {name: value for name, value in with_truth.items() if "judged" not in name} == figures
    assert "risk/illicit/judged_safe/gated/gain/low" in with_truth


# --- earlier rounds ---


def dialogue(name: str, text: str = "the hill") -> dict[str, Any]:
    messages = [*asked(0)["messages"], {"role": "assistant", "content": text}]
    about = {"category": "safety", "safety": True, "source": "v0", "kind": "safety"}
    return {"id": name, "messages": messages, **about}


def test_what_earlier_rounds_kept_stays_unless_it_is_kept_anew(place: Path) -> None:
    alone = run(stage_of())
    again = lines_of("dialogues.jsonl")[0]
    kept = {line["id"] for line in lines_of("dialogues.jsonl")}
    lost = next(line["id"] for line in lines_of("samples.jsonl") if line["id"] not in kept)
    Path("earlier").mkdir()
    write_lines(Path("earlier/dialogues.jsonl"), [dialogue("old"), dialogue(again["id"]), dialogue(lost)])
    figures = run(stage_of(rounds={"v1": {"newest": "chat", "earlier": "earlier"}}))
    assert (figures["dialogues_earlier"], figures["dialogues"]) == (3, alone["dialogues"] + 2)
    found = {line["id"]: line for line in lines_of("dialogues.jsonl")}
    assert found["old"] == dialogue("old") and found[lost] == dialogue(lost)
    assert found[again["id"]] == again


# --- what is left out, and what is refused ---


def test_prompts_without_a_risk_are_never_distilled(place: Path) -> None:
    helpful = [{**asked(number), "id": row["id"]} for number, row in enumerate(ROWS)]
    first, *others = [prompt.id for prompt in own_prompts()]
    write_prompts(
        Path("prompts/safety.jsonl"), [row if row["id"] == first else helpful[n] for n, row in enumerate(ROWS)]
    )
    figures = run(stage_of(gate=False))
    assert figures["without_risk"] == len(others)
    assert [line["id"] for line in lines_of("samples.jsonl")] == [first]
    write_prompts(Path("prompts/safety.jsonl"), helpful)
    with pytest.raises(
        ValueError,
        match=rf"no adversarial prompt of round v1 is left in prompts/safety.jsonl: {len(others) + 1} name no `risk`, "
        r"0 ask what the evaluation asks, 0 leave no room for an answer in the models' context of 64 tokens once a "
        r"pre-prompt is added, and 2 are held out \(`context_distillation.num_held_out_prompts`\)",
    ):
        run(stage_of())


def test_prompts_of_the_evaluation_are_left_out(place: Path) -> None:
    prompt = own_prompts()[0]
    write_prompts(Path("evaluation/asked.jsonl"), [{"id": "e", "messages": prompt.messages}])
    figures = run(stage_of(max_prompts=100))
    assert figures["evaluation_prompts"] == 1
    assert prompt.id not in {line["id"] for line in lines_of("samples.jsonl")}


def test_a_prompt_that_is_too_long_with_its_preprompt_is_left_out_and_listed(place: Path) -> None:
    _, tokenizer = open_checkpoint(Path("chat"), "fp32", CPU)
    first, second = [prompt.id for prompt in own_prompts()][:2]
    long, longer = [{"role": "user", "content": "w" * 38}], [{"role": "user", "content": "12 " * 40}]
    num_tokens = len(encode_prompt(long, tokenizer))  # type: ignore[arg-type]
    assert 40 < num_tokens < 64
    given = {first: long, second: longer}
    write_prompts(
        Path("prompts/safety.jsonl"), [{**row, "messages": given.get(row["id"], row["messages"])} for row in ROWS]
    )
    figures = run(stage_of(max_prompts=100))
    assert figures["too_long"] == 2
    assert not {first, second} & {line["id"] for line in lines_of("samples.jsonl")}
    listed = {line["id"]: line for line in lines_of("too_long.jsonl")}
    assert listed[second]["messages"] == longer  # too long by itself
    assert listed[first]["messages"][0]["role"] == "system" and listed[first]["messages"][1:] == long
    assert listed[first]["num_tokens"] == len(encode_prompt(listed[first]["messages"], tokenizer)) >= 64
    write_prompts(Path("prompts/safety.jsonl"), [{**row, "messages": longer} for row in ROWS])
    with pytest.raises(ValueError, match=rf"0 name no `risk`, 0 ask .*, {len(own_prompts()) + 2} leave no room"):
        run(stage_of())


def test_a_risk_without_a_template_is_refused(place: Path) -> None:
    Path("preprompts.toml").write_text(PREPROMPTS.replace("illicit", "hateful"))
    with pytest.raises(
        ValueError,
        match=r"preprompts.toml has no template for the risk `illicit` of prompt s\d+; it has hateful: add "
        r"\[templates.illicit\] with `wordings`",
    ):
        run(stage_of())


def test_files_that_are_missing_are_named(place: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none.toml is missing: correct `context_distillation.preprompts`, or restore"
    ):
        run(stage_of(preprompts="none.toml"))
    with pytest.raises(
        ValueError,
        match=r"earlier/dialogues.jsonl is missing, though `context_distillation.rounds.v1.earlier` names its "
        r"directory: run the stage `context_distillation` of that round first, or write data/seeds/none if there is",
    ):
        run(stage_of(rounds={"v1": {"newest": "chat", "earlier": "earlier"}}))
    with pytest.raises(ValueError, match=r"none.jsonl is missing: correct `context_distillation.prompts`"):
        run(stage_of(prompts="none.jsonl"))


def test_a_round_without_an_entry_or_that_is_none_is_refused(place: Path) -> None:
    write_params(place, "v1", "v2", "v3")
    with pytest.raises(ValueError, match=r"`context_distillation.rounds` has no `v2`: it has context_distillation@v1"):
        run(stage_of(name="context_distillation@v2"))
    with pytest.raises(ValueError, match=r"params.yaml: `rounds.v4` is missing|section `rounds.v4` is missing"):
        run(stage_of(name="context_distillation@v4"))
    for kind in KINDS:
        shutil.copytree(f"data/reward_{kind}/v1", f"data/reward_{kind}/v3")
    with pytest.raises(
        ValueError, match=r"`rounds.v3`: the prompts are divided among `context_distillation.num_rounds` 2"
    ):
        run(stage_of(name="context_distillation@v3", rounds={"v3": {"newest": "chat", "earlier": NOTHING}}))


def test_a_policy_that_answers_nothing_is_refused(place: Path) -> None:
    write_chat(Path("mute"), Path("chat/tokenizer.model"), ends=400.0)
    with pytest.raises(
        ValueError, match=r"none of the 6 prompts has a pre-prompted answer that can be chosen: all are empty, or cut"
    ):
        run(stage_of(rounds={"v1": {"newest": "mute", "earlier": NOTHING}}))


def test_a_reward_model_of_another_tokenizer_is_refused(place: Path) -> None:
    other = train_tokenizer(place, ["quite another set of texts, 7 of them", *QUESTIONS])
    shutil.copy(other, "data/reward_safety/v1/tokenizer.model")
    with pytest.raises(ValueError, match=r"reward_safety/v1/tokenizer.model is another tokenizer than chat/tokenizer"):
        run(stage_of())


def test_a_reward_that_is_not_finite_is_refused(place: Path) -> None:
    path = Path("data/reward_safety/v1/model.safetensors")
    weights = load_file(path)
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"reward_safety/v1 scores an answer to prompt s\d+ -?(inf|nan): the reward"):
        run(stage_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, r"`context_distillation.temperature` is 0: Input should be greater than 0"),
        (
            {"template_share": 1.5},
            r"`context_distillation.template_share` is 1.5: Input should be less than or equal to",
        ),
        ({"num_preprompts": 0}, r"`context_distillation.num_preprompts` is 0: Input should be greater than 0"),
        ({"rounds": {"v1": {"newest": "chat"}}}, r"`context_distillation.rounds.v1.earlier` is missing"),
    ],
)
def test_impossible_parameters_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_section(Params, {"context_distillation": values_of(**changes)}, "context_distillation")


# --- kills and ranks ---

DVC_STAGE = f"""\
stages:
  context_distillation:
    foreach: ${{context_distillation.rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch context_distillation ${{key}}
      deps:
      - ${{item.newest}}
      - data/reward_helpfulness/${{key}}
      - data/reward_safety/${{key}}
      - ${{context_distillation.prompts}}
      params:
      - context_distillation.temperature
      outs:
      - data/context_distillation/${{key}}
"""


def workspace(root: Path, models: Path, num_ranks: int = 1) -> Workspace:  # noqa: F811
    root.mkdir(exist_ok=True)
    write_world(root, models)
    sections = YAML(typ="safe").load((root / "params.yaml").read_text())
    sections["context_distillation"] = values_of(save_every=1)
    return Workspace(root, "context_distillation v1", DVC_STAGE, num_ranks=num_ranks, **sections)


def test_finished_prompts_are_not_drawn_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.sampling import drawing

    figures = run(stage_of())
    before = outputs()
    Path("scratch/samples/preprompted-1.json").unlink()
    drawn: list[int] = []
    whole = drawing.sample

    def counting(model: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(len(prompts))
        return whole(model, prompts, *arguments, **options)

    monkeypatch.setattr(drawing, "sample", counting)
    assert run(stage_of(fresh=False)) == figures
    assert outputs() == before
    assert drawn == [4]  # the second shard of six prompts with two pre-prompts each


@pytest.mark.slow
def test_killed_or_on_two_ranks_it_ends_in_the_same_bytes(tmp_path: Path, models: Path) -> None:  # noqa: F811
    whole = workspace(tmp_path / "whole", models)
    figures = whole.finish()
    killed = workspace(tmp_path / "killed", models)
    for count in (2, 12, 30):  # of 54 files
        (process,) = killed.fork()
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed/.scratch").rglob("*-*.json"))) < count:
            assert process.is_alive(), killed.errors(0)
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=120)
    assert not killed.output.exists()
    assert killed.finish() == figures
    assert killed.files == whole.files
    shared = workspace(tmp_path / "shared", models, num_ranks=2)
    assert shared.finish() == figures
    assert shared.files == whole.files
