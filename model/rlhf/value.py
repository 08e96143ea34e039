"""The value model: what a policy may still expect before each token (Schulman et al. 2017).

Its layers start as a reward model's, which has learnt what is worth much; its head is drawn small, so that it begins by
expecting next to nothing, which is the mean of whitened rewards.

Shapes: T tokens of a packed batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.network.packing import Documents
from model.network.transformer import Checkpointing, Decoder, ModelConfig, Network
from model.network.weights import fill_weights
from model.scoring.reward import Head


class ValueModel(Network):
    """A decoder with a head that tells each token's value."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, checkpointing)
        self.value = Head(config.hidden_size)

    def forward(self, ids_T: Tensor, documents: Documents) -> Tensor:
        """Return what is expected after each token (T,), float32."""
        values_T: Tensor = self.value(self.model(ids_T, documents))
        return values_T


def draw_value_head(model: ValueModel, seed: int) -> None:
    """Initialise the head, identically on any number of ranks, with a deviation of 1 / (width + 1)."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 1 / (model.config.hidden_size + 1)
    fill_weights(model.value, lambda _, shape: torch.empty(shape).normal_(0.0, deviation, generator=generator))
