from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from safetensors.torch import load_file

from model.network.checkpoint import load_weights, open_checkpoint, save_model
from model.network.transformer import Llama, ModelConfig, first_weights
from model.network.weights import fill_weights
from model.scoring.pairs import MARGINS, Pair, batch_of_pairs, pair_losses, ranking_losses
from model.scoring.reward import RewardModel, draw_heads, open_reward, plan_batches, save_reward, score
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, draw_weights, start_engine, train_step

CPU = torch.device("cpu")
NO_LIMIT = 2**40
VOCABULARY = 290


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    join_alone()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["the llama walks over the hill", "a hill, a llama, 12 steps"]
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts, VOCABULARY))


def reward_model(tells_safety: bool = False, seed: int = 1, zero_stage: int = 0, **changes: Any) -> RewardModel:
    params = EngineParams.model_validate({**TRAINED, "zero_stage": zero_stage})
    config = ModelConfig.model_validate({**SMALL, "vocab_size": VOCABULARY, "initializer_range": 0.1, **changes})
    model = build_model(partial(RewardModel, tells_safety=tells_safety), config, params)
    generator = torch.Generator().manual_seed(seed)
    fill_weights(model.model, lambda name, shape: first_weights(name, shape, config, generator))
    draw_heads(model, seed)
    return model.eval()


def dialogues(*lengths: int) -> list[list[int]]:
    """Ids that begin with BOS and end with EOS."""
    rng = np.random.default_rng(sum(lengths))
    return [[1, *rng.integers(3, VOCABULARY, length - 2).tolist(), 2] for length in lengths]


def pairs_of(num_pairs: int, **changes: Any) -> list[Pair]:
    rng = np.random.default_rng(1)
    texts = dialogues(*rng.integers(5, 30, 2 * num_pairs).tolist())
    fields = {"margin": 0.0, "chosen_safe": None, "rejected_safe": None, **changes}
    return [Pair(texts[2 * n], texts[2 * n + 1], **fields) for n in range(num_pairs)]


# --- the loss ---


def test_the_ranking_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 1.5])
    losses = ranking_losses(chosen, rejected, torch.tensor([0.0, 0.0, 1.0]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1.5))])
    # equals of a margin of 1 lose as much as a pair that is wrong by 1
    assert ranking_losses(chosen[:1], rejected[:1], torch.ones(1)).item() == pytest.approx(math.log(1 + math.e))


def test_the_margins_are_the_papers() -> None:
    assert list(MARGINS["small"].values()) == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert list(MARGINS["large"].values()) == [3, 2, 1, 0, 0]
    assert set(MARGINS["none"].values()) == {0}
    assert all(margins[None] == 0 for margins in MARGINS.values())


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 3))
def test_a_greater_lead_costs_less_and_a_margin_more(chosen: float, rejected: float, margin: float) -> None:
    scores = torch.tensor([chosen, rejected, margin], dtype=torch.float64, requires_grad=True)
    loss = ranking_losses(*scores)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[0] <= 0 <= gradient[1] and gradient[2] >= 0
    assert gradient[0] == pytest.approx(-gradient[1])
    assert loss >= ranking_losses(scores[0], scores[1], torch.zeros(()))


def test_without_margin_and_labels_the_loss_is_the_plain_one() -> None:
    model, pairs = reward_model(tells_safety=True), pairs_of(5)
    plain, lead = pair_losses(model, batch_of_pairs(pairs, CPU), 0.0)
    assert torch.equal(plain, -torch.nn.functional.logsigmoid(lead))
    with_head, _ = pair_losses(model, batch_of_pairs(pairs, CPU), 0.5)
    assert torch.allclose(with_head, plain, atol=1e-6)  # no label is known: nothing to add


def test_pairs_keep_their_order_in_a_batch_sorted_by_length() -> None:
    model, pairs = reward_model(), pairs_of(7)
    _, lead = pair_losses(model, batch_of_pairs(pairs, CPU), 0.0)
    one_by_one = [score(model, [pair.chosen, pair.rejected], 100) for pair in pairs]
    assert lead.tolist() == pytest.approx([chosen - rejected for chosen, rejected in one_by_one], abs=1e-5)


def test_the_safety_loss_is_the_mean_over_the_labels_a_pair_has() -> None:
    model, (one, two, three) = reward_model(tells_safety=True), pairs_of(3)
    pairs = [
        one._replace(chosen_safe=True, rejected_safe=False),
        two._replace(chosen_safe=False),
        three._replace(margin=1.0),
    ]
    batch = batch_of_pairs(pairs, CPU)
    scores, logits = model(batch.ids, batch.documents, True)[:, batch.places]
    losses, lead = pair_losses(model, batch, 0.25)
    scores, logits, losses, lead = (found.detach() for found in (scores, logits, losses, lead))
    ranking = [math.log1p(math.exp(-value)) for value in (lead[0], lead[1], lead[2] - 1.0)]
    safety = [
        (math.log1p(math.exp(-logits[0, 0])) + math.log1p(math.exp(logits[1, 0]))) / 2,
        math.log1p(math.exp(logits[0, 1])),
        0.0,
    ]
    expected = [a + 0.25 * b for a, b in zip(ranking, safety, strict=True)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    assert lead.tolist() == pytest.approx((scores[0] - scores[1]).tolist())
    nothing, _ = pair_losses(model, batch_of_pairs(pairs, CPU, weight=0.0), 0.25)
    assert nothing.tolist() == [0, 0, 0]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_training_raises_the_chosen_above_the_rejected(zero_stage: int) -> None:
    pairs = pairs_of(4, chosen_safe=True, rejected_safe=False)
    params = EngineParams.model_validate({**TRAINED, "zero_stage": zero_stage, "learning_rate": 3e-3})
    engine = start_engine(reward_model(tells_safety=True, zero_stage=zero_stage), params, num_steps=12)
    leads: list[torch.Tensor] = []

    def loss_of(engine: Any, batch: Any) -> torch.Tensor:
        losses, lead = pair_losses(engine, batch, 0.5)
        leads.append(lead.detach())
        return losses.sum()

    batches = [batch_of_pairs(pairs[:2], CPU), batch_of_pairs(pairs[2:], CPU)]
    steps = [train_step(engine, batches, loss_of, 4, lambda loss, norm: True) for _ in range(12)]
    assert steps[-1].loss < steps[0].loss / 2
    assert all((lead > 0).all() for lead in leads[-2:])


# --- scores ---


@settings(max_examples=25)
@given(st.lists(st.integers(3, 32), min_size=1, max_size=12), st.integers(1, 100))
def test_a_score_is_the_same_alone_and_in_any_batch(lengths: list[int], tokens_at_once: int) -> None:
    model, texts = reward_model(), dialogues(*lengths)
    together = score(model, texts, tokens_at_once)
    assert together == pytest.approx([score(model, [text], 1)[0] for text in texts], abs=1e-5)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_each_dialogue_once_within_the_limit(lengths: list[int], tokens_at_once: int) -> None:
    texts = [[0] * length for length in lengths]
    batches = plan_batches(texts, tokens_at_once)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[n] for n in batch) <= tokens_at_once for batch in batches)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=["", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [NO_LIMIT, 20_000], ids=["one file", "sharded"])
def test_transformers_gives_the_same_scores(
    max_shard_bytes: int, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    model, texts = reward_model(tells_safety=True, **changes), dialogues(5, 9, 30, 12)
    save_reward(model, tokenizer, tmp_path / "reward", {"step": 7}, max_shard_bytes)
    theirs, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert isinstance(theirs, LlamaForSequenceClassification)
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == tokenizer.unk_id
    assert not found["missing_keys"] and not found["unexpected_keys"]
    scores = score(model, texts, 1000)
    assert np.ptp(scores) > 0.05
    longest = max(map(len, texts))
    pad = [tokenizer.unk_id]
    on_the_right = [text + pad * (longest - len(text)) for text in texts]
    on_the_left = [pad * (longest - len(text)) + text for text in texts]
    with torch.no_grad():
        for rows in ([[text] for text in texts], [on_the_right]):
            logits = torch.cat([theirs(torch.tensor(row)).logits[:, 0] for row in rows])
            assert logits.tolist() == pytest.approx(scores, abs=1e-5)
        mask = torch.tensor([[int(token != pad[0]) for token in row] for row in on_the_left])
        logits = theirs(torch.tensor(on_the_left), attention_mask=mask).logits[:, 0]
        assert logits.tolist() == pytest.approx(scores, abs=1e-5)
    again, _ = open_reward(tmp_path / "reward", "fp32", CPU)
    assert score(again, texts, 1000) == scores
    heads = load_file(tmp_path / "reward" / "safety_head.safetensors")
    assert torch.equal(heads["safety.weight"], model.get_parameter("safety.weight"))
    assert json.loads((tmp_path / "reward" / "training.json").read_text()) == {"step": 7}
    sharded = (tmp_path / "reward" / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes != NO_LIMIT)


def test_a_reward_model_begins_as_the_chat_model_with_a_head_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = build_model(
        Llama,
        ModelConfig.model_validate({**SMALL, "vocab_size": VOCABULARY}),
        EngineParams.model_validate(TRAINED),
    )
    draw_weights(chat, 3)
    save_model(chat, tokenizer, tmp_path / "chat", {}, NO_LIMIT)
    model = RewardModel(chat.config, "off")
    load_weights(model, tmp_path / "chat", part="model")
    draw_heads(model, 1)
    assert all(torch.equal(weight, chat.get_parameter(name)) for name, weight in model.model.named_parameters("model"))
    heads = [reward_model(seed=seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_reward_model_and_a_chat_model_are_not_taken_for_each_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_reward(reward_model(), tokenizer, tmp_path / "reward", {}, NO_LIMIT)
    assert not (tmp_path / "reward" / "safety_head.safetensors").exists()
    with pytest.raises(ValueError, match="reward is a reward model, which only scores answers"):
        open_checkpoint(tmp_path / "reward", "fp32", CPU)
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    for architectures in (["LlamaForCausalLM"], None):
        (tmp_path / "reward" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match="reward is not a reward model: name one, for instance data/reward_"):
            open_reward(tmp_path / "reward", "fp32", CPU)


def test_a_score_in_half_precision_has_the_resolution_of_float32() -> None:
    model = reward_model().to(torch.bfloat16)
    scores = score(model, dialogues(*range(5, 30)), 1000)
    rounded = torch.tensor(scores).to(torch.bfloat16).float().tolist()
    assert all(a != b for a, b in zip(scores, rounded, strict=True))
