"""A reward model: a Llama 2 whose language-model head is replaced by a scalar (Llama 2, section 3.2.2).

The score of a dialogue's last answer is read at the dialogue's last token, its EOS. Weights have the names of Hugging
Face's LlamaForSequenceClassification. That class has no safety head: ours is in a separate file,
safety_head.safetensors. Dialogues are packed, not padded, so a score doesn't depend on the rest of the batch.

Shapes: T tokens of a packed batch, D hidden size, B documents (dialogues).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.network.checkpoint import REWARD_ARCHITECTURE, is_reward_model, open_model, save_model
from model.network.packing import Documents, documents_of
from model.network.ranks import from_all_ranks
from model.network.transformer import Checkpointing, Decoder, ModelConfig, Network, first_weights
from model.network.weights import fill_weights
from model.text.tokenizer import Tokenizer

SAFETY_HEAD = "safety_head.safetensors"


class Head(nn.Module):
    """One number from a hidden state, in float32: in bfloat16 close scores would become equal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, size))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Return a number for each document (B,), float32."""
        return nn.functional.linear(hidden_BD.float(), self.weight.float())[:, 0]


class RewardModel(Network):
    """A decoder with a head that scores and, if safety is learnt too, one that tells whether an answer is safe."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing, tells_safety: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, checkpointing)
        self.score = Head(config.hidden_size)
        self.safety = Head(config.hidden_size) if tells_safety else None

    def forward(self, ids_T: Tensor, documents: Documents, with_safety: bool = False) -> Tensor:
        """Return each document's score (B,), float32; with safety (2, B): scores, and the logits of being safe."""
        hidden_BD = self.model(ids_T, documents)[documents.boundaries[1:] - 1]
        scores_B: Tensor = self.score(hidden_BD)
        if not with_safety:
            return scores_B
        assert self.safety is not None, "the model was built without a safety head"
        return torch.stack((scores_B, self.safety(hidden_BD)))


def draw_heads(model: RewardModel, seed: int) -> None:
    """Initialise a reward model's heads, identically on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for head in (model.score, model.safety):
        if head is not None:
            fill_weights(head, lambda name, shape: first_weights(name, shape, model.config, generator))


def save_reward(
    model: RewardModel, tokenizer: Tokenizer, directory: Path, training: Mapping[str, Any], max_shard_bytes: int
) -> None:
    """Write a reward model's checkpoint, as `save_model` does."""
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    fields = {"architectures": [REWARD_ARCHITECTURE], "pad_token_id": tokenizer.unk_id, **labels}
    apart = {name: SAFETY_HEAD for name, _ in model.named_parameters() if name.startswith("safety.")}
    save_model(model, tokenizer, directory, training, max_shard_bytes, fields, apart)


def open_reward(
    directory: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> tuple[RewardModel, Tokenizer]:
    """Return a directory's reward model, for inference, and its tokenizer; if there are several ranks, all call.

    Raises ValueError as `model.network.checkpoint` does, and for a model that is not a reward model.
    """
    if not is_reward_model(directory):
        raise ValueError(f"{directory} is not a reward model: name one, for instance data/reward_helpfulness/v1")
    return open_model(RewardModel, directory, precision, device)


# --- scoring ---


def packed(dialogues: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Documents]:
    """Return dialogues one after another (T,), and the layout of the batch."""
    ids = np.concatenate([np.asarray(dialogue, dtype=np.int64) for dialogue in dialogues])
    return torch.from_numpy(ids).to(device), documents_of([len(dialogue) for dialogue in dialogues], device)


def plan_batches(dialogues: Sequence[Sequence[int]], tokens_at_once: int) -> list[list[int]]:
    """Return the dialogues of each batch, as indices: shortest first, up to `tokens_at_once`, or a longer one alone."""
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(dialogues)), key=lambda number: len(dialogues[number])):
        if len(dialogues[number]) > room:
            batches.append([])
            room = tokens_at_once
        batches[-1].append(number)
        room -= len(dialogues[number])
    return batches


def score(model: RewardModel, dialogues: Sequence[Sequence[int]], tokens_at_once: int) -> list[float]:
    """Return the score of each dialogue, given its ids up to and including its last answer's EOS.

    `tokens_at_once` limits memory, and changes no score.
    """
    scores, device = [0.0] * len(dialogues), model.score.weight.device
    with torch.no_grad():
        for batch in plan_batches(dialogues, tokens_at_once):
            found = model(*packed([dialogues[number] for number in batch], device)).tolist()
            for number, value in zip(batch, found, strict=True):
                scores[number] = value
    return scores


def score_on_ranks(model: RewardModel, dialogues: Sequence[Sequence[int]], tokens_at_once: int) -> list[float]:
    """Return the dialogues' scores as `score` does, on every rank; the ranks share the work, and all call this."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = range(rank, len(dialogues), world)
    scores = score(model, [dialogues[number] for number in own], tokens_at_once)
    return from_all_ranks(dict(zip(own, scores, strict=True)))
