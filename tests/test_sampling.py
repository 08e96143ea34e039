from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import config_of, ids_of, model_of
from torch import Tensor

from model.network.packing import documents_of
from model.network.transformer import Llama
from model.sampling.sampler import Response, Sampling, draw, probabilities, sample, uniform_numbers

CPU = torch.device("cpu")
EOS = 2
LENGTHS = (5, 20, 1, 40, 58, 7, 7)


def model_with(context: int = 64, **changes: object) -> Llama:
    return model_of(config_of(max_position_embeddings=context, num_key_value_heads=2, **changes), seed=1, scale=2.5)


def prompts_of(model: Llama, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [[1, *ids_of(model.config, length - 1, seed=length).tolist()] for length in lengths]


def sampling_of(**changes: float) -> Sampling:
    return Sampling.model_validate({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 30, **changes})


def responses_of(model: Llama, prompts: Sequence[Sequence[int]], **changes: Any) -> list[list[Response]]:
    arguments: dict[str, Any] = {
        "sampling": sampling_of(), "num_samples": 3, "eos_id": EOS, "seeds": [len(prompt) for prompt in prompts],
        "max_rows": 8, "description": None,
    }  # fmt: skip
    return sample(model, prompts, **{**arguments, **changes})


def ids_in(responses: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.ids for response in group] for group in responses]


def numbers_in(responses: list[list[Response]]) -> list[float]:
    return [number for group in responses for response in group for number in response.log_probabilities]


def plain_log_probabilities(model: Llama, prompt: list[int], ids: list[int]) -> Tensor:
    """The distribution before each token of a response, by one forward pass over all."""
    with torch.no_grad():
        logits = model(torch.tensor(prompt + ids), documents_of([len(prompt) + len(ids)], CPU))
    return logits.float().log_softmax(dim=-1)[len(prompt) - 1 : -1]


# --- what is drawn is the model's own ---


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "tie_word_embeddings": True}], ids=["plain", "tied"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_equal_those_of_a_plain_forward_pass(changes: dict[str, object], temperature: float) -> None:
    model = model_with(**changes)
    prompts = prompts_of(model)
    responses = responses_of(model, prompts, sampling=sampling_of(temperature=temperature, top_p=0.9, top_k=40))
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            expected = plain_log_probabilities(model, prompt, response.ids)
            found = torch.tensor(response.log_probabilities)
            assert (expected.gather(1, torch.tensor(response.ids)[:, None])[:, 0] - found).abs().max() < 1e-5
            if temperature == 0:
                assert response.ids == expected.argmax(dim=-1).tolist()


def test_greedy_equals_transformers_generate() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = model_with()
    theirs = LlamaForCausalLM(LlamaConfig(**model.config.model_dump(), attn_implementation="sdpa")).eval()
    theirs.load_state_dict(model.state_dict())
    prompts = prompts_of(model)
    responses = responses_of(model, prompts, sampling=sampling_of(temperature=0), num_samples=1)
    for prompt, (response,) in zip(prompts, responses, strict=True):
        given_ids = torch.tensor([prompt])
        room = min(30, 64 - len(prompt))
        expected = theirs.generate(
            given_ids, attention_mask=torch.ones_like(given_ids), do_sample=False, max_new_tokens=room,
            eos_token_id=EOS, pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        assert response.ids == expected.tolist()


def test_half_precision_stays_near_a_plain_forward_pass() -> None:
    model = model_with().to(torch.bfloat16)
    prompts = prompts_of(model)
    for prompt, group in zip(prompts, responses_of(model, prompts), strict=True):
        for response in group:
            expected = plain_log_probabilities(model, prompt, response.ids)
            found = torch.tensor(response.log_probabilities)
            difference = expected.gather(1, torch.tensor(response.ids)[:, None])[:, 0] - found
            # logits are rounded to 8 bits; another row's keys or another position would shift them by their spread
            assert difference.abs().mean() < 0.04 * expected.std()


# --- nothing depends on the company ---


@settings(max_examples=15)
@given(
    max_rows=st.integers(1, 25),
    order=st.permutations(range(len(LENGTHS))),
    kept=st.integers(1, len(LENGTHS)),
    temperature=st.sampled_from([0.0, 1.0, 1.3]),
)
def test_a_response_depends_on_its_prompt_and_seed_only(
    max_rows: int, order: list[int], kept: int, temperature: float
) -> None:
    model = model_with()
    prompts = prompts_of(model)
    seeds = list(range(100, 100 + len(prompts)))
    sampling = sampling_of(temperature=temperature, top_p=0.95)
    expected = responses_of(model, prompts, sampling=sampling, seeds=seeds)
    chosen = order[:kept]
    found = responses_of(
        model,
        [prompts[number] for number in chosen],
        sampling=sampling,
        seeds=[seeds[number] for number in chosen],
        max_rows=max_rows,
    )
    expected = [expected[number] for number in chosen]
    assert ids_in(found) == ids_in(expected)
    assert numbers_in(found) == pytest.approx(numbers_in(expected), abs=1e-5)


def test_samples_of_a_prompt_differ_and_are_drawn_again_alike() -> None:
    model = model_with()
    prompts = prompts_of(model)
    first = responses_of(model, prompts, num_samples=4, seeds=[9] * len(prompts))
    assert first == responses_of(model, prompts, num_samples=4, seeds=[9] * len(prompts))
    for group in first:
        assert len({tuple(response.ids) for response in group}) == 4
    # fewer samples are the first of more, and another seed gives others
    fewer = responses_of(model, prompts, num_samples=2, seeds=[9] * len(prompts))
    assert ids_in(fewer) == ids_in([group[:2] for group in first])
    other = responses_of(model, prompts, num_samples=4, seeds=[10] * len(prompts))
    assert all(a != b for a, b in zip(ids_in(first), ids_in(other), strict=True))
    # the same prompt twice with the same seed is answered alike
    twice = responses_of(model, [prompts[0], prompts[0]], seeds=[3, 3])
    assert ids_in(twice)[0] == ids_in(twice)[1]


def test_a_shorter_limit_gives_the_same_beginning() -> None:
    model = model_with()
    prompts = prompts_of(model)
    long = responses_of(model, prompts)
    short = responses_of(model, prompts, sampling=sampling_of(max_new_tokens=5))
    assert ids_in(short) == [[response.ids[:5] for response in group] for group in long]
    for group, longer in zip(short, long, strict=True):
        for response, whole in zip(group, longer, strict=True):
            assert response.finished == (response.ids[-1] == EOS) == (whole.finished and len(whole.ids) <= 5)


# --- where a response ends ---


def test_a_response_ends_with_eos_or_is_cut_at_the_limit_or_the_contexts_end() -> None:
    model = model_with()
    prompts = prompts_of(model, [5, 40, 58, 63])
    responses = responses_of(model, prompts, num_samples=20, max_rows=50)
    ends: Counter[str] = Counter()
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            room = min(30, 64 - len(prompt))
            assert len(response.ids) == len(response.log_probabilities) <= room
            assert EOS not in response.ids[:-1]
            assert response.finished == (response.ids[-1] == EOS)
            if not response.finished:
                assert len(response.ids) == room
            ends["EOS" if response.finished else f"cut at {room}"] += 1
    assert set(ends) == {"EOS", "cut at 30", "cut at 24", "cut at 6", "cut at 1"}


def rows_forwarded(model: Llama, run: Any) -> list[int]:
    """How many tokens each forward pass reads."""
    counts: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    run()
    handle.remove()
    return counts


def test_a_prompt_is_read_once_and_finished_rows_leave() -> None:
    model = model_with()
    prompts = prompts_of(model)
    found: list[list[list[Response]]] = []
    for max_rows in (1, 4, 100):
        counts = rows_forwarded(model, lambda rows=max_rows: found.append(responses_of(model, prompts, max_rows=rows)))
        written = [len(response.ids) for group in found[-1] for response in group]
        # each prompt's tokens once, whatever its samples, then each response's tokens once, but for its last
        assert sum(counts) == sum(LENGTHS) + sum(written) - len(written)
    # all at once: one packed pass, then as many rows as have still something to write
    assert counts == [sum(LENGTHS)] + [sum(length > done for length in written) for done in range(1, max(written))]


def test_waiting_prompts_take_the_rows_of_finished_ones() -> None:
    model = model_with()
    prompts = prompts_of(model, [5] * 6)
    changes = {"num_samples": 1, "max_rows": 4, "sampling": sampling_of(max_new_tokens=4), "eos_id": -1}
    # no token ends a response: four rows write four tokens each, then the other two do
    counts = rows_forwarded(model, lambda: responses_of(model, prompts, **changes))
    assert counts == [20, 4, 4, 4, 10, 2, 2, 2]


def test_prompts_that_enter_together_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with()
    prompts = prompts_of(model, [5, 20, 10, 40, 7])
    expected = responses_of(model, prompts, max_rows=15)
    monkeypatch.setattr("model.sampling.sampler.PREFILL", 30)
    found: list[list[list[Response]]] = []
    counts = rows_forwarded(model, lambda: found.append(responses_of(model, prompts, max_rows=15)))
    assert counts[:4] == [25, 10, 40, 7]
    assert ids_in(found[0]) == ids_in(expected)


def test_each_token_is_heard_as_it_is_drawn() -> None:
    model = model_with()
    heard: dict[tuple[int, int], list[int]] = {}
    responses = responses_of(
        model,
        prompts_of(model),
        max_rows=4,
        on_token=lambda prompt, number, token: heard.setdefault((prompt, number), []).append(token),
    )
    assert heard == {
        (prompt, number): response.ids
        for prompt, group in enumerate(responses)
        for number, response in enumerate(group)
    }


def test_progress_counts_responses_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_with()
    responses_of(model, prompts_of(model), description="answers")
    errors = capsys.readouterr().err
    assert "answers: 100%" in errors and "21/21" in errors and "tokens_per_second=" in errors
    responses_of(model, prompts_of(model))
    assert capsys.readouterr().err == ""


def test_no_prompts_give_no_responses() -> None:
    assert responses_of(model_with(), []) == []


# --- the distribution ---

LOG_PROBABILITIES = torch.tensor([[0.5, 0.05, 0.25, 0.125, 0.075]]).log()


def shares(**changes: float) -> list[float]:
    kept = probabilities(LOG_PROBABILITIES, sampling_of(**changes))[0]
    return [float(share) for share in kept / kept.sum()]


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    assert shares() == pytest.approx([0.5, 0.05, 0.25, 0.125, 0.075])
    squares = [0.25, 0.0025, 0.0625, 0.015625, 0.005625]
    assert shares(temperature=0.5) == pytest.approx([square / sum(squares) for square in squares])
    assert shares(temperature=1e-30) == pytest.approx([1, 0, 0, 0, 0])


def test_top_k_keeps_so_many() -> None:
    assert shares(top_k=1) == [1, 0, 0, 0, 0]
    assert shares(top_k=3) == pytest.approx([0.5 / 0.875, 0, 0.25 / 0.875, 0.125 / 0.875, 0])
    assert shares(top_k=5) == shares(top_k=50) == shares()


def test_top_p_keeps_the_fewest_that_hold_it() -> None:
    assert shares(top_p=0.4) == [1, 0, 0, 0, 0]
    assert shares(top_p=0.6) == pytest.approx([2 / 3, 0, 1 / 3, 0, 0])
    assert shares(top_p=0.9) == pytest.approx([0.5 / 0.95, 0, 0.25 / 0.95, 0.125 / 0.95, 0.075 / 0.95])
    assert shares(top_p=1e-20) == [1, 0, 0, 0, 0]


def test_top_p_counts_within_top_k_after_the_temperature() -> None:
    # of 0.5 and 0.25 the first holds 2/3: enough for 0.6, not for 0.7
    assert shares(top_k=2, top_p=0.6) == [1, 0, 0, 0, 0]
    assert shares(top_k=2, top_p=0.7) == pytest.approx([2 / 3, 0, 1 / 3, 0, 0])
    # at temperature 0.5 the first holds 0.25 / 0.33625 = 0.74
    assert shares(temperature=0.5, top_p=0.7) == [1, 0, 0, 0, 0]


def test_equals_are_kept_together() -> None:
    even = torch.full((1, 4), 0.25).log()
    for changes in ({"top_k": 2}, {"top_p": 0.3}):
        assert probabilities(even, sampling_of(**changes)).tolist() == [[0.25] * 4]


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 1), top_k=st.integers(0, 40))
def test_truncation_equals_transformers(seed: int, top_p: float, top_k: int) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 3
    ids = torch.zeros(3, 1, dtype=torch.long)
    warped = logits / 0.8
    if top_k:
        warped = TopKLogitsWarper(top_k)(ids, warped)
    expected = TopPLogitsWarper(top_p)(ids, warped).softmax(dim=-1)
    sampling = sampling_of(temperature=0.8, top_p=top_p, top_k=top_k)
    found = probabilities(logits.log_softmax(dim=-1), sampling)
    assert torch.allclose(found / found.sum(dim=-1, keepdim=True), expected, atol=1e-6)


def test_uniform_numbers_fall_on_tokens_by_their_probability() -> None:
    # sums: 0.5, 0.55, 0.8, 0.925, 1
    falls = {0.0: 0, 0.499: 0, 0.501: 1, 0.549: 1, 0.551: 2, 0.799: 2, 0.801: 3, 0.924: 3, 0.926: 4, 1 - 2**-32: 4}
    assert draw(LOG_PROBABILITIES.expand(len(falls), -1), list(falls), sampling_of()).tolist() == list(falls.values())
    # a token of probability 0 is never drawn, at the ends neither
    cut = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().expand(4, -1)
    assert draw(cut, [0.0, 0.499, 0.501, 1 - 2**-32], sampling_of()).tolist() == [1, 1, 3, 3]
    assert draw(LOG_PROBABILITIES, [0.99], sampling_of(temperature=0)).tolist() == [0]


def test_uniform_numbers_are_uniform_and_unlike_between_seeds_and_samples() -> None:
    rows = np.array([uniform_numbers(seed, number, 500) for seed in range(20) for number in range(20)])
    counts, _ = np.histogram(rows, bins=50, range=(0, 1))
    assert rows.min() >= 0 and rows.max() < 1
    assert np.abs(counts - 4000).max() < 5 * math.sqrt(4000)
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.25  # 500 numbers: deviation 0.045
    assert uniform_numbers(3, 4, 9) == uniform_numbers(3, 4, 500)[:9]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    model = model_with()
    sampling = sampling_of(temperature=0.6, top_p=0.8, max_new_tokens=1)
    prompt, count = [1, 7, 20], 4000
    (responses,) = responses_of(model, [prompt], sampling=sampling, num_samples=count, max_rows=count)
    plain = plain_log_probabilities(model, prompt, [0])
    kept = plain.exp()[0] ** (1 / 0.6)
    kept /= kept.sum()
    order = kept.argsort(descending=True)
    num_kept = int((kept[order].cumsum(0) < 0.8).sum()) + 1
    expected = torch.zeros_like(kept)
    expected[order[:num_kept]] = kept[order[:num_kept]] / kept[order[:num_kept]].sum()
    found = torch.bincount(torch.tensor([response.ids[0] for response in responses]), minlength=len(kept)) / count
    assert num_kept > 3
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt()).all()


# --- bad input ---


def test_a_prompt_without_room_for_a_response_is_named() -> None:
    model = model_with()
    message = "prompt 1 has 64 tokens and leaves no room for a response in the model's context of 64: shorten it"
    with pytest.raises(ValueError, match=message):
        responses_of(model, prompts_of(model, [5, 64]))
    (group,) = responses_of(model, prompts_of(model, [63]))
    assert all(len(response.ids) == 1 for response in group)


def test_an_empty_prompt_is_named() -> None:
    model = model_with()
    with pytest.raises(ValueError, match="prompt 2 is empty: begin it with BOS"):
        responses_of(model, [*prompts_of(model, [5, 6]), []])


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"top_p": 0.5}])
def test_a_model_that_computes_nan_is_refused(temperature: float, changes: dict[str, float]) -> None:
    model = model_with()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="the model's logits after prompt 0 are NaN: its weights are damaged"):
        responses_of(model, prompts_of(model), sampling=sampling_of(temperature=temperature, **changes))


@pytest.mark.parametrize(
    "changes", [{"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_impossible_values_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        sampling_of(**changes)
