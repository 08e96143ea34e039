from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from stages import Workspace, stage_here
from test_reward_drift import WORDS, write_reward_model

from model.network.checkpoint import open_checkpoint, save_model
from model.network.transformer import Llama, ModelConfig
from model.sampling.sampler import sample
from model.scoring.reward import open_reward, score
from model.text.dialogue import decode_answer, encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, draw_weights
from tasks.multi_turn import Params, run
from tasks.running.digests import number_of

CPU = torch.device("cpu")
GREEDY = {"temperature": 0, "top_p": 1, "top_k": 0, "max_new_tokens": 4}
WAYS = ("first", "second", "better", "alternating")


def dialogue(number: int, num_turns: int, **values: Any) -> dict[str, Any]:
    """A dialogue of the evaluation, whose answers nobody may see."""
    messages = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"{WORDS[(number + turn) % 9]}?"})
        messages.append({"role": "assistant", "content": "secret"})
    return {"id": f"d{number}", "messages": messages[:-1], "category": "factual", **values}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    join_alone()
    root = tmp_path_factory.mktemp("models")
    path = train_tokenizer(root, [" ".join(WORDS), "[INST] the llama [/INST] walks"])
    tokenizer = Tokenizer(path)
    for seed, name in enumerate(("first", "second")):
        values = {**SMALL, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64, "initializer_range": 0.3}
        model = build_model(Llama, ModelConfig.model_validate(values), EngineParams.model_validate(TRAINED))
        draw_weights(model, seed=seed)
        save_model(model, tokenizer, root / "data" / name, {"step": 1}, 10**9)
    for seed, kind in enumerate(("helpfulness", "safety")):
        write_reward_model(root / "data" / f"reward_{kind}" / "v1", path, seed)
    return root / "data"


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "data")
    lines = [dialogue(0, 3), dialogue(1, 2), dialogue(2, 1), dialogue(3, 2, category="safety", risk="hate", attack="a")]
    Path("prompts").mkdir()
    Path("prompts/asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def values_of(**changes: Any) -> dict[str, Any]:
    values = {
        "root": "prompts", "prompts": ["asked.jsonl"], "max_dialogues": {"helpfulness": 9, "safety": 9},
        "first": "data/first", "second": "data/second", "rewards": "v1", "sampling": GREEDY, "precision": "fp32",
        "max_rows": 4, "tokens_at_once": 64,
    }  # fmt: skip
    return {**values, **changes}


def run_with(**changes: Any) -> dict[str, float]:
    return dict(run(stage_here("multi_turn", Params.model_validate(values_of(**changes)))))


def lines_of() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/prompts.jsonl").read_text().splitlines()]


def answer_of(model: Llama, tokenizer: Tokenizer, messages: Any, prompt: str, turn: int) -> str:
    """What a model answers to messages alone."""
    (responses,) = sample(
        model, [encode_prompt(messages, tokenizer)], Params.model_validate(values_of()).sampling, num_samples=1,
        eos_id=tokenizer.eos_id, seeds=[number_of(f"1 play {prompt} {turn}")], max_rows=1, description=None,
    )  # fmt: skip
    return decode_answer(responses[0].ids, tokenizer)


def test_each_way_has_the_answers_of_the_model_whose_turn_it_is(place: Path) -> None:
    figures = run_with()
    lines = lines_of()
    assert figures == {"dialogues": 3, "prompts": 12, **{f"{way}/prompts": 3 for way in WAYS}}  # d2 has a single turn
    assert {line["id"] for line in lines} == {f"{way}-d{number}" for way in WAYS for number in (0, 1, 3)}
    players = [open_checkpoint(Path("data", name), "fp32", CPU) for name in ("first", "second")]
    order = list(dict.fromkeys(line["asks"] for line in lines))
    chosen = set()
    for line in lines:
        original = dialogue(int(line["asks"][1:]), 3 if line["asks"] == "d0" else 2)
        users = [message["content"] for message in original["messages"] if message["role"] == "user"]
        assert [each["content"] for each in line["messages"] if each["role"] == "user"] == users
        assert line["messages"][-1]["role"] == "user"
        kind = "safety" if line["asks"] == "d3" else "helpfulness"
        assert (line["category"] == "safety") == (kind == "safety") == ("risk" in line)
        for turn in range(len(users) - 1):
            before, given = line["messages"][: 2 * turn + 1], line["messages"][2 * turn + 1]["content"]
            both = [answer_of(*player, before, line["asks"], turn) for player in players]
            if line["gathered"] == "better":
                reward, tokenizer = open_reward(Path(f"data/reward_{kind}/v1"), "fp32", CPU)
                dialogues = [[*before, {"role": "assistant", "content": text}] for text in both]
                scores = score(reward, [encode_dialogue(each, tokenizer).ids for each in dialogues], 64)
                own = int(scores[1] > scores[0])
                chosen.add(own)
            else:
                turns = {"first": 0, "second": 1, "alternating": (order.index(line["asks"]) + turn) % 2}
                own = turns[line["gathered"]]
            assert given == both[own], (line["id"], turn)
    assert chosen == {0, 1}  # the test would see a model that is always chosen


def test_as_many_dialogues_of_a_kind_are_taken_as_asked_and_none_asks_no_model(place: Path) -> None:
    assert run_with(max_dialogues={"helpfulness": 1, "safety": 0})["dialogues"] == 1
    first = {line["asks"] for line in lines_of()}
    run_with(max_dialogues={"helpfulness": 2, "safety": 0})
    assert first < {line["asks"] for line in lines_of()} == {"d0", "d1"}
    none = {"max_dialogues": {"helpfulness": 0, "safety": 0}, "second": "data/seeds/none"}
    assert run_with(**none) == {"dialogues": 0, "prompts": 0}
    assert Path("out/prompts.jsonl").read_text() == ""


def test_a_stopped_run_goes_on_with_the_next_turn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import multi_turn

    run_with()
    whole = Path("out/prompts.jsonl").read_bytes()
    Path("scratch/turns/1-0-1.json").unlink()  # as if killed in the second turn
    turns: list[int] = []
    take = multi_turn.take_turn_in_all_ways

    def counting(*values: Any) -> Any:
        turns.append(values[-1])
        return take(*values)

    monkeypatch.setattr(multi_turn, "take_turn_in_all_ways", counting)
    run(stage_here("multi_turn", Params.model_validate(values_of()), fresh=False))
    assert turns == [1]
    assert Path("out/prompts.jsonl").read_bytes() == whole


def test_a_dialogue_that_finds_no_room_gives_no_prompt(place: Path) -> None:
    long = dialogue(4, 2)
    long["messages"][0]["content"] = "walks " * 80
    with Path("prompts/asked.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    figures = run_with()
    assert (figures["dialogues"], figures["prompts"]) == (4, 12)
    assert "d4" not in {line["asks"] for line in lines_of()}


def test_what_cannot_be_gathered_is_named(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`multi_turn.second` is data/seeds/none: name a checkpoint, or set `max_d"):
        run_with(second="data/seeds/none")
    Path("prompts/asked.jsonl").write_text(json.dumps(dialogue(0, 2)) + "\n")
    with pytest.raises(ValueError, match=r"`multi_turn.prompts` holds no dialogue of several turns for safety: name"):
        run_with()
    with pytest.raises(ValueError, match=r"prompts/gone.jsonl is missing: correct `multi_turn.prompts`"):
        run_with(prompts=["gone.jsonl"])


DVC_STAGE = f"""\
stages:
  multi_turn:
    cmd: exec {sys.executable} -m tasks.workers.launch multi_turn
    deps:
    - prompts
    params:
    - multi_turn
    outs:
    - data/multi_turn
"""


@pytest.mark.slow
def test_ranks_share_the_dialogues_and_gather_what_one_would(place: Path, tmp_path: Path) -> None:
    figures = run_with()
    root = tmp_path / "workspace"
    for name in ("data", "prompts"):
        shutil.copytree(name, root / name)
    workspace = Workspace(root, "multi_turn", DVC_STAGE, 2, multi_turn=values_of())
    assert workspace.finish() == figures
    assert workspace.files["prompts.jsonl"] == Path("out/prompts.jsonl").read_bytes()
    assert math.isfinite(figures["prompts"])
