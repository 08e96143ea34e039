"""Training processes for tests: this one as the only rank, small models and tokenizers for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from model.network.ranks import join_ranks
from model.network.transformer import Llama, ModelConfig
from model.training.engine import EngineParams, build_model, draw_weights, start_engine
from tasks.workers.launch import LOOPBACK

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip

TRAINED: dict[str, Any] = {
    "zero_stage": 0, "precision": "fp32", "offload": "none", "activation_checkpointing": "off", "batch_rows": 8,
    "micro_batch_rows": 4, "learning_rate": 1e-2, "final_learning_rate_ratio": 0.1, "warmup_steps": 4,
    "warmup_ratio": 0.0, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-5, "weight_decay": 0.1, "gradient_clipping": 1.0,
}  # fmt: skip


def join_alone() -> torch.device:
    """Make this process the only rank; a second call changes nothing."""
    if not torch.distributed.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", GLOO_SOCKET_IFNAME=LOOPBACK)
    return join_ranks()


def small_engine(num_steps: int, seed: int = 1, vocab_size: int = 64, **changes: Any) -> Any:
    params = EngineParams.model_validate({**TRAINED, **changes})
    config = ModelConfig.model_validate({**SMALL, "vocab_size": vocab_size})
    model = build_model(Llama, config, params)
    draw_weights(model, seed)
    return start_engine(model, params, num_steps)


def train_tokenizer(directory: Path, texts: Sequence[str], vocab_size: int = 290, **options: Any) -> Path:
    """The file of a small tokenizer, made as stage `train_tokenizer` makes them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 20), model_prefix=str(directory / "tokenizer"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    return directory / "tokenizer.model"
