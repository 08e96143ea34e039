from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import SMALL, TRAINED, join_alone, small_engine
from torch import Tensor

from model.network.packing import IGNORED
from model.network.transformer import Llama, ModelConfig, first_weights
from model.network.weights import fill_weights
from model.rlhf.advantages import (
    clamped_log_odds,
    estimate_advantages,
    explained_variance,
    token_rewards,
    whiten,
    whiten_tokens,
)
from model.rlhf.losses import is_clipped, kl_k1, kl_k3, policy_losses, value_losses
from model.rlhf.rollouts import (
    Known,
    Rollout,
    batch_of_rollouts,
    padded,
    policy_loss,
    responses_of,
    token_log_probabilities,
    token_values,
    value_loss,
)
from model.rlhf.value import ValueModel, draw_value_head
from model.sampling.sampler import Sampling, sample
from model.training.engine import EngineParams, build_model, draw_weights, start_engine, train_step

CPU = torch.device("cpu")
EOS = 2
numbers = st.floats(-5, 5, width=32)


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    join_alone()


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# --- rewards ---


def test_log_odds_are_cut_either_way() -> None:
    assert clamped_log_odds(math.inf, 10) == 10
    assert clamped_log_odds(-math.inf, 10) == -10
    assert clamped_log_odds(-3.5, 10) == -3.5
    assert clamped_log_odds(0.0, 10) == 0.0


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    assert whiten(tensor(1, 2, 3, 6)).tolist() == pytest.approx([-2 / 3.5**0.5, -1 / 3.5**0.5, 0, 3 / 3.5**0.5])
    # a reward of exactly 0 counts like any other
    assert whiten(tensor(0, 2)).tolist() == pytest.approx([-1, 1])


def test_equal_values_are_whitened_to_zeros() -> None:
    assert whiten(tensor(3, 3, 3)).tolist() == [0, 0, 0]
    assert whiten(tensor(7)).tolist() == [0]


def test_only_tokens_are_whitened() -> None:
    found = whiten_tokens(tensor([1, 3, 99], [5, 7, 9]), mask_of(2, 3))
    assert found[0, 2] == 0
    assert found[mask_of(2, 3)].tolist() == pytest.approx(whiten(tensor(1, 3, 5, 7, 9)).tolist())


def test_the_score_is_on_the_last_token_wherever_it_is_and_each_token_pays_for_its_divergence() -> None:
    ratios = tensor([0.5, -0.5, 1.0], [2.0, 9.0, 9.0], [0.0, 1.0, 9.0])  # the 9s are after the end
    found = token_rewards(tensor(3.0, -1.0, 0.0), ratios, mask_of(3, 1, 2), kl_coefficient=0.1)
    assert found.tolist() == [
        pytest.approx([-0.05, 0.05, 2.9]),
        pytest.approx([-1.2, 0, 0]),
        pytest.approx([0, -0.1, 0]),
    ]


@given(st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=4), numbers, st.floats(0, 1))
def test_rewards_sum_to_the_score_less_the_weighted_log_ratios(
    ratios: list[list[float]], score: float, coefficient: float
) -> None:
    rows = token_rewards(torch.full((len(ratios),), score), padded(ratios), mask_of(*map(len, ratios)), coefficient)
    for row, own in zip(rows, ratios, strict=True):
        assert float(row.sum()) == pytest.approx(score - coefficient * sum(own), abs=1e-4)


# --- advantages ---


def slow_advantages(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """The definition (Schulman et al. 2016, equation 16): a sum over all later surprises for each token."""
    after = [*values[1:], 0.0]
    surprises = [r + discount * v - own for r, v, own in zip(rewards, after, values, strict=True)]
    return [
        sum((discount * decay) ** (later - place) * surprises[later] for later in range(place, len(rewards)))
        for place in range(len(rewards))
    ]


@given(
    st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=7), min_size=1, max_size=4),
    st.floats(0.5, 1),
    st.floats(0, 1),
)
def test_advantages_are_those_of_the_definition(
    rows: list[list[tuple[float, float]]], discount: float, decay: float
) -> None:
    rewards, values = ([[pair[which] for pair in row] for row in rows] for which in (0, 1))
    is_token = mask_of(*map(len, rows))
    found = estimate_advantages(padded(rewards), padded(values), is_token, discount, decay)
    expected = padded([slow_advantages(*each, discount, decay) for each in zip(rewards, values, strict=True)])
    assert torch.allclose(found, expected, atol=1e-4)
    assert not found[~is_token].any()


def test_without_decay_only_the_next_value_counts_and_with_a_decay_of_1_only_rewards() -> None:
    rewards, values = tensor([0, 0, 6]), tensor([1, 2, 3])
    assert estimate_advantages(rewards, values, mask_of(3), 1.0, 0.0).tolist() == [[1, 1, 3]]
    assert estimate_advantages(rewards, values, mask_of(3), 1.0, 1.0).tolist() == [[5, 4, 3]]


def test_nothing_after_the_end_counts() -> None:
    rewards, values = tensor([1, 2, 50], [1, 2, 3]), tensor([0, 1, 70], [0, 1, 1])
    is_token = mask_of(2, 3)
    found = estimate_advantages(rewards, values, is_token, 1.0, 1.0)
    assert found[0].tolist() == [3, 1, 0]
    assert found[1].tolist() == [6, 4, 2]


def test_explained_variance() -> None:
    assert explained_variance(tensor(1, 2, 3), tensor(1, 2, 3)) == 1
    assert explained_variance(tensor(1, 2, 3), tensor(5, 5, 5)) == 0
    assert explained_variance(tensor(1, 2, 3), tensor(3, 2, 1)) == pytest.approx(-3)
    assert explained_variance(tensor(4, 4), tensor(1, 2)) == 0


# --- losses ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # gained enough
        (0.5, 2.0, -1.0, True),  # lost: it may come back
        (1.1, -2.0, 2.2, True),
        (0.5, -2.0, 1.6, False),  # lost enough
        (1.5, -2.0, 3.0, True),  # gained where it should have lost
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_policy_loss_is_clipped_on_the_side_that_the_advantage_asks_for(
    ratio: float, advantage: float, loss: float, moves: bool
) -> None:
    log_probability = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    found = policy_losses(log_probability, tensor(-3.0), tensor(advantage), clip=0.2)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    found.sum().backward()
    assert log_probability.grad is not None
    assert float(log_probability.grad) == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-6)
    clipped = is_clipped(log_probability.detach(), tensor(-3.0), tensor(advantage), clip=0.2)
    assert clipped.item() == (not moves and advantage != 0)


@pytest.mark.parametrize(
    ("value", "expected", "loss", "gradient"),
    [
        (1.1, 2.0, 0.5 * 0.9**2, -0.9),  # within the clip
        (1.5, 2.0, 0.5 * 0.8**2, 0.0),  # beyond, towards the return: the clipped one is worse, nothing to learn
        (1.5, 0.0, 0.5 * 1.5**2, 1.5),  # beyond, away from it
        (0.5, 0.0, 0.5 * 0.8**2, 0.0),
        (0.5, 2.0, 0.5 * 1.5**2, -1.5),
    ],
)
def test_the_value_loss_is_the_worse_of_the_value_and_the_clipped_value(
    value: float, expected: float, loss: float, gradient: float
) -> None:
    values = torch.tensor([value], requires_grad=True)
    found = value_losses(values, tensor(1.0), tensor(expected), clip=0.2)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    found.sum().backward()
    assert values.grad is not None
    assert float(values.grad) == pytest.approx(gradient, abs=1e-6)


def test_estimators_of_kl_by_value_and_gradient() -> None:
    log_probability = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    reference = tensor(-1.0, -2.0, -0.5)
    assert kl_k1(log_probability, reference).tolist() == [0, 1, -0.5]
    k3 = kl_k3(log_probability, reference)
    assert k3.tolist() == pytest.approx([0, math.exp(-1), math.exp(0.5) - 1.5])
    k3.sum().backward()
    assert log_probability.grad is not None
    assert log_probability.grad.tolist() == pytest.approx([0, 1 - math.exp(-1), 1 - math.exp(0.5)])


def test_estimators_of_kl_have_the_mean_of_the_true_one() -> None:
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(5, generator=generator).log_softmax(0)
    reference = torch.randn(5, generator=generator).log_softmax(0)
    true = (policy.exp() * (policy - reference)).sum()
    for estimator in (kl_k1, kl_k3):  # the mean over all tokens, weighted as they are sampled
        assert float((policy.exp() * estimator(policy, reference)).sum()) == pytest.approx(float(true), rel=1e-5)


# --- packed rollouts ---

ROLLOUTS = [
    Rollout([1, 10, 11], [20, EOS]),
    Rollout([1, 12], [EOS]),
    Rollout([1, 10, EOS, 1, 13], [21, 22, 23, 24]),  # two turns before; it was cut
]


def test_what_is_predicted_is_each_token_of_the_response_eos_included_at_the_place_before_it() -> None:
    batch = batch_of_rollouts(ROLLOUTS, None, CPU)
    x = IGNORED
    assert batch.ids.tolist() == [1, 10, 11, 20, EOS, 1, 12, EOS, 1, 10, EOS, 1, 13, 21, 22, 23, 24]
    assert batch.targets.tolist() == [x, x, 20, EOS, x, x, EOS, x, x, x, x, x, 21, 22, 23, 24, x]
    assert batch.documents.lengths == (5, 3, 9)
    assert responses_of(torch.arange(17.0), batch, ROLLOUTS) == [[2, 3], [6], [12, 13, 14, 15]]


def test_what_is_known_stands_where_its_token_is_predicted() -> None:
    rows = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0, 7.0]]
    known = [Known(*(tensor(*row) * factor for factor in (1, 10, 100, 1000))) for row in rows]
    batch = batch_of_rollouts(ROLLOUTS, known, CPU)
    for factor, own in zip((1, 10, 100, 1000), batch.known, strict=True):
        assert responses_of(own, batch, ROLLOUTS) == [[factor * value for value in row] for row in rows]
        assert not own[~batch.is_target].any()


def llama(seed: int = 1, vocab_size: int = 64) -> Llama:
    config = ModelConfig.model_validate({**SMALL, "vocab_size": vocab_size, "initializer_range": 0.3})
    model = build_model(Llama, config, EngineParams.model_validate(TRAINED))
    draw_weights(model, seed)
    return model


def test_the_logits_before_a_token_score_it() -> None:
    model = llama()
    batch = batch_of_rollouts(ROLLOUTS, None, CPU)
    with torch.no_grad():
        found = responses_of(token_log_probabilities(model, batch), batch, ROLLOUTS)
        for rollout, own in zip(ROLLOUTS, found, strict=True):
            one = batch_of_rollouts([rollout], None, CPU)
            logits = model(one.ids, one.documents)
            expected = [
                float(logits[len(rollout.prompt) - 1 + place].log_softmax(-1)[token])
                for place, token in enumerate(rollout.response)
            ]
            assert own == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_sampled_log_probabilities_are_those_of_training(max_rows: int) -> None:
    model = llama(vocab_size=16)
    prompts = [[1, 5, 6], [1, 9], [1, 10, EOS, 1, 13, 14, 15], [1, 3, 4, 5]]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)
    responses = sample(
        model, prompts, sampling, num_samples=1, eos_id=EOS, seeds=[1, 2, 3, 4], max_rows=max_rows, description=None
    )
    rollouts = [Rollout(prompt, own.ids) for prompt, (own,) in zip(prompts, responses, strict=True)]
    assert len({len(rollout.response) for rollout in rollouts}) > 1
    batch = batch_of_rollouts(rollouts, None, CPU)
    with torch.no_grad():
        found = responses_of(token_log_probabilities(model, batch), batch, rollouts)
    for own, (response,) in zip(found, responses, strict=True):
        assert own == pytest.approx(response.log_probabilities, abs=1e-5)


# --- steps ---


def known_of(engine: Any, rollouts: list[Rollout], seed: int = 1) -> list[Known]:
    """Sampled log-probabilities as the engine has them, advantages and returns at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        batch = batch_of_rollouts(rollouts, None, CPU)
        rows = responses_of(token_log_probabilities(engine, batch), batch, rollouts)
    return [Known(tensor(*row), torch.zeros(len(row)), *torch.randn(2, len(row), generator=generator)) for row in rows]


def eight_rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(3)

    def some(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [Rollout([1, *some(6)], [*some(9), EOS]) for _ in range(8)]


def count_of(rollouts: list[Rollout]) -> int:
    return sum(len(rollout.response) for rollout in rollouts)


def step_of(engine: Any, rollouts: list[Rollout], known: list[Known], micro_rows: int, clip: float = 0.2) -> Any:
    batches = [
        batch_of_rollouts(rollouts[n : n + micro_rows], known[n : n + micro_rows], CPU)
        for n in range(0, len(rollouts), micro_rows)
    ]
    return train_step(
        engine, batches, lambda e, b: policy_loss(e, b, clip)[0], count_of(rollouts), lambda loss, norm: True
    )


def test_before_the_first_step_ratios_are_1_and_the_loss_is_that_of_the_advantages() -> None:
    engine, rollouts = small_engine(10), eight_rollouts()
    known = known_of(engine, rollouts)
    batch = batch_of_rollouts(rollouts, known, CPU)
    loss, log_probabilities = policy_loss(engine, batch, clip=0.2)
    assert torch.equal(log_probabilities, batch.known[0])  # so that each ratio is exactly 1
    assert float(loss.detach()) == pytest.approx(-sum(float(own.advantages.sum()) for own in known), abs=1e-4)


def test_gradients_are_the_same_for_any_number_of_micro_batches() -> None:
    rollouts = eight_rollouts()
    found = []
    for micro_rows in (8, 2):
        engine = small_engine(10, micro_batch_rows=micro_rows, gradient_clipping=1e9)
        step = step_of(engine, rollouts, known_of(engine, rollouts), micro_rows)
        found.append(
            (step.loss, step.gradient_norm, [weight.detach().clone() for weight in engine.module.parameters()])
        )
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_step_touches_every_weight_and_no_rate_moves_none() -> None:
    rollouts = eight_rollouts()
    engine = small_engine(10)
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    step_of(engine, rollouts, known_of(engine, rollouts), 4)
    assert all(not torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True))
    still = small_engine(10, learning_rate=1e-30)
    before = [weight.detach().clone() for weight in still.module.parameters()]
    step_of(still, rollouts, known_of(still, rollouts), 4)
    assert all(torch.equal(old, new) for old, new in zip(before, still.module.parameters(), strict=True))


def test_steps_raise_what_has_an_advantage_and_lower_what_has_none() -> None:
    engine, rollouts = small_engine(30, learning_rate=3e-3), eight_rollouts()
    known = known_of(engine, rollouts)
    signs = [1.0 if number % 2 else -1.0 for number in range(8)]
    known = [
        replace(own, advantages=torch.full_like(own.advantages, sign)) for own, sign in zip(known, signs, strict=True)
    ]
    for _ in range(3):
        step_of(engine, rollouts, known, 4)
    batch = batch_of_rollouts(rollouts, None, CPU)
    with torch.no_grad():
        after = responses_of(token_log_probabilities(engine, batch), batch, rollouts)
    gains = [sum(new) - float(own.log_probabilities.sum()) for new, own in zip(after, known, strict=True)]
    assert all(gain * sign > 0 for gain, sign in zip(gains, signs, strict=True))


# --- the value model ---


def value_engine(**changes: Any) -> Any:
    params = EngineParams.model_validate({**TRAINED, **changes})
    model = build_model(ValueModel, ModelConfig.model_validate({**SMALL, "vocab_size": 64}), params)
    generator = torch.Generator().manual_seed(1)
    fill_weights(model.model, lambda name, shape: first_weights(name, shape, model.config, generator))
    draw_value_head(model, 1)
    return start_engine(model, params, 40)


def test_a_value_model_expects_little_at_first_and_learns_returns() -> None:
    engine, rollouts = value_engine(), eight_rollouts()
    deviation = float(engine.module.value.weight.detach().std())
    assert deviation == pytest.approx(1 / 33, rel=0.5)
    returns = [torch.full((len(rollout.response),), float(number % 2)) for number, rollout in enumerate(rollouts)]
    losses = []
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    for _ in range(30):
        with torch.no_grad():
            batch = batch_of_rollouts(rollouts, None, CPU)
            values = responses_of(token_values(engine, batch), batch, rollouts)
        known = [
            Known(torch.zeros_like(own), tensor(*row), torch.zeros_like(own), own)
            for own, row in zip(returns, values, strict=True)
        ]
        batches = [batch_of_rollouts(rollouts[n : n + 4], known[n : n + 4], CPU) for n in (0, 4)]
        step = train_step(
            engine, batches, lambda e, b: value_loss(e, b, clip=0.5), count_of(rollouts), lambda loss, norm: True
        )
        losses.append(step.loss)
        if len(losses) == 1:
            after = list(engine.module.parameters())
            assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert losses[-1] < 0.5 * losses[0]
