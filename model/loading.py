"""A checkpoint opened to sample from: its model, whole on this process's device, and its tokenizer; no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from model.checkpoint import load_weights, read_config, read_tokenizer
from model.tokenizer import Tokenizer
from model.transformer import Llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_checkpoint(
    directory: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of a Hugging Face Llama directory; if there are several ranks, all call.

    Raises ValueError as `model.checkpoint` does.
    """
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    if not torch.distributed.is_initialized():  # alone: one rank, known to nobody else
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    model = Llama(config, "off").to(device, DTYPES[precision]).eval()
    load_weights(model, directory)
    for parameter in model.parameters():  # rank 0 has read them
        torch.distributed.broadcast(parameter.data, src=0)
    return model, tokenizer
