from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from test_reward_model import VOCABULARY, reward_model

from model.network.transformer import Llama, ModelConfig
from model.sampling.sampler import Sampling, sample
from model.scoring.answers import Asked, check_same_tokenizer, log_probabilities, score_answers
from model.scoring.reward import RewardModel, score
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, draw_weights

NO_LIMIT = 2**40


@pytest.fixture(scope="module")
def model() -> RewardModel:
    join_alone()
    return reward_model(max_position_embeddings=64)


def some_ids(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(3, VOCABULARY, length)]


def one_by_one(model: RewardModel, asked: list[Asked]) -> list[list[float]]:
    """What `score` finds, which reads the prompt again for each answer."""
    return [score(model, [[*prompt, *answer] for answer in answers], NO_LIMIT) for prompt, answers in asked]


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(own) for own in found] == [len(own) for own in expected]
    for own, others in zip(found, expected, strict=True):
        assert own == pytest.approx(others, abs=1e-5)


def test_answers_that_are_prefixes_of_each_other_empty_or_one_token(model: RewardModel) -> None:
    rng = np.random.default_rng(1)
    whole = [*some_ids(rng, 9), 2]
    prompt = [1, *some_ids(rng, 12)]
    asked = [
        Asked(prompt, [whole, whole[:4], whole[:1], [], [2], whole]),
        Asked([*prompt, *whole[:3]], [whole[3:], [2]]),
        Asked([1], [[2], [], whole]),
    ]
    expected = one_by_one(model, asked)
    assert_close(score_answers(model, asked, NO_LIMIT), expected)
    # an answer goes on where its prompt ends, wherever that is
    assert expected[0][0] == pytest.approx(expected[1][0], abs=1e-5)
    assert len({round(value, 4) for value in expected[0]}) == 5


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(0, 12), max_size=5)), min_size=1, max_size=4),
    st.sampled_from([1, 17, 60, 200, NO_LIMIT]),
)
def test_scores_are_those_of_reading_the_prompt_each_time(
    model: RewardModel, lengths: list[tuple[int, list[int]]], tokens_at_once: int
) -> None:
    rng = np.random.default_rng(len(lengths))
    asked = [Asked(some_ids(rng, prompt), [some_ids(rng, answer) for answer in own]) for prompt, own in lengths]
    assert_close(score_answers(model, asked, tokens_at_once), one_by_one(model, asked))


def test_scores_are_close_in_bfloat16() -> None:
    model = reward_model(max_position_embeddings=64).to(torch.bfloat16)
    rng = np.random.default_rng(2)
    asked = [Asked(some_ids(rng, 11), [some_ids(rng, 5), some_ids(rng, 7)])]
    assert score_answers(model, asked, NO_LIMIT)[0] == pytest.approx(one_by_one(model, asked)[0], abs=0.05)


def test_each_prompt_is_read_once(model: RewardModel) -> None:
    rng = np.random.default_rng(3)
    asked = [Asked(some_ids(rng, 20), [some_ids(rng, 4) for _ in range(10)]) for _ in range(3)]
    counts: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, given, out: counts.append(len(given[0])))
    for tokens_at_once in (NO_LIMIT, 64):  # 24 tokens an answer with its prompt: two at once
        score_answers(model, asked, tokens_at_once)
        assert sum(counts) == 3 * 20 + 30 * 4
        counts.clear()
    hook.remove()


def test_nothing_is_scored(model: RewardModel) -> None:
    assert score_answers(model, [], 10) == []
    assert score_answers(model, [Asked([1, 5], [])], 10) == [[]]


def test_log_probabilities_are_the_samplers(model: RewardModel) -> None:
    config = ModelConfig.model_validate({**SMALL, "vocab_size": VOCABULARY, "initializer_range": 0.2})
    chat = build_model(Llama, config, EngineParams.model_validate(TRAINED))
    draw_weights(chat, 1)
    prompts = [[1, 5, 9], [1, 7]]
    drawn = Sampling(temperature=1, top_p=1, top_k=0, max_new_tokens=9)
    responses = sample(chat.eval(), prompts, drawn, num_samples=3, eos_id=2, seeds=[1, 2], max_rows=4, description=None)
    asked = [Asked(prompt, [each.ids for each in own]) for prompt, own in zip(prompts, responses, strict=True)]
    expected = [[float(np.sum(each.log_probabilities)) for each in own] for own in responses]
    assert_close(log_probabilities(chat, asked, 16), expected)


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    texts = ["the llama walks over the hill", "a hill, a llama, 12 steps"]
    names = {"chat": (texts, 290), "copy": None, "smaller": (texts, 285), "other": (["we know no other beast"], 290)}
    tokenizers = {}
    for name, made in names.items():
        (tmp_path / name).mkdir()
        if made is None:
            shutil.copy(tmp_path / "chat" / "tokenizer.model", tmp_path / name)
        else:
            train_tokenizer(tmp_path / name, *made)
        tokenizers[name] = Tokenizer(tmp_path / name / "tokenizer.model")
    check_same_tokenizer(tokenizers["copy"], tokenizers["chat"])
    with pytest.raises(ValueError, match=r"smaller/tok\S+ is another tokenizer than \S+ \(it has 285 tokens and"):
        check_same_tokenizer(tokenizers["smaller"], tokenizers["chat"])
    with pytest.raises(
        ValueError,
        match=r"other/tok\S+ is another tokenizer than .* \(token \d+ is '.*' in it and '.*' in the",
    ):
        check_same_tokenizer(tokenizers["other"], tokenizers["chat"])
