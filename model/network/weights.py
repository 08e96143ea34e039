"""Access to a network's weights one by one, whether each rank holds them whole or they are sharded (ZeRO 3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def shape_of(parameter: Tensor) -> torch.Size:
    """Return a weight's full shape, even if it is sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameter: Tensor, changed: bool) -> AbstractContextManager[None]:
    """Gather a sharded weight on each rank for a block; if it is `changed`, rank 0's changes reach all ranks."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # a rank with such a weight has imported it already; others start faster without it

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0 if changed else None
    )
    return gathered


def fill_weights(model: nn.Module, value_of: Callable[[str, torch.Size], Tensor]) -> None:
    """Set each weight to what `value_of` returns for its name and shape; all ranks call, rank 0's values count.

    Weights come one at a time, in the model's order: a sharded one is whole only for a moment. Weights that are not
    sharded reach the other ranks when the engine starts.
    """
    for name, parameter in model.named_parameters():
        shape = shape_of(parameter)
        with whole(parameter, changed=True), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(value_of(name, shape))
