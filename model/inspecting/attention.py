"""What a model's attention looks at, for a picture (Llama 2, figure 10). Letters of shapes are transformer.py's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from model.network.transformer import Attend, Llama, rotary_angles


@torch.no_grad()
def highest_attention(model: Llama, ids: list[int]) -> Tensor:
    """Return each token's highest attention, over all layers and heads, to each: (T, T), 0 to later ones."""
    weight = model.lm_head.weight
    highest_TT = weight.new_zeros((len(ids), len(ids)), dtype=torch.float32)

    def attends() -> Iterator[Attend]:
        while True:
            yield partial(_attend, highest_TT)

    positions_T = torch.arange(len(ids), device=weight.device)
    ids_T = torch.tensor(ids, device=weight.device)
    model.model.run_layers(ids_T, rotary_angles(model.config, positions_T), attends())
    return highest_TT.cpu()


def _attend(highest_TT: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Attend causally, and note the highest weights."""
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = (x_TKH.repeat_interleave(groups, dim=1) for x_TKH in (k_TKH, v_TKH))
    scores_NTT = torch.einsum("tnh,snh->nts", q_TNH.float(), k_TNH.float()) * q_TNH.shape[-1] ** -0.5
    later_TT = torch.ones_like(highest_TT, dtype=torch.bool).triu(1)
    weights_NTT = scores_NTT.masked_fill(later_TT, -torch.inf).softmax(-1)
    torch.maximum(highest_TT, weights_NTT.amax(0), out=highest_TT)
    return torch.einsum("nts,snh->tnh", weights_NTT, v_TNH.float()).to(q_TNH.dtype)
