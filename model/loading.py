"""A checkpoint opened to sample from or to score: its model, whole on this process's device, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from model.checkpoint import is_reward_model, load_weights, read_config, read_tokenizer
from model.reward import RewardModel
from model.tokenizer import Tokenizer
from model.transformer import Checkpointing, Llama, ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Kind = TypeVar("Kind", Llama, RewardModel)


def open_checkpoint(
    directory: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of a Hugging Face Llama directory; if there are several ranks, all call.

    Raises ValueError as `model.checkpoint` does, and for a reward model, which can't answer.
    """
    if is_reward_model(directory):
        raise ValueError(f"{directory} is a reward model, which scores answers and gives none: name a chat model")
    return _open(Llama, directory, precision, device)


def open_reward(
    directory: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> tuple[RewardModel, Tokenizer]:
    """Return the reward model and the tokenizer of its directory, to score with; if there are several ranks, all call.

    Raises ValueError as `model.checkpoint` does, and for a model that is no reward model.
    """
    if not is_reward_model(directory):
        raise ValueError(f"{directory} is no reward model: name one, for instance data/reward_helpfulness/v1")
    return _open(RewardModel, directory, precision, device)


def _open(
    kind: Callable[[ModelConfig, Checkpointing], Kind],
    directory: Path,
    precision: Literal["fp32", "bf16"],
    device: torch.device,
) -> tuple[Kind, Tokenizer]:
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    if not torch.distributed.is_initialized():  # alone: one rank, known to nobody else
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    model = kind(config, "off").to(device, DTYPES[precision]).eval()
    load_weights(model, directory)
    for parameter in model.parameters():  # rank 0 has read them
        torch.distributed.broadcast(parameter.data, src=0)
    return model, tokenizer
