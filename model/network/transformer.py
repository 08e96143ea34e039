"""Llama 2 in PyTorch (Llama 2, section 2.2; LLaMA, sections 2.2 and 2.4), with Hugging Face's parameter names.

Shapes: T tokens of a packed batch (packing.py), D hidden size, N query heads, K key/value heads, H head size, F
feed-forward size, V vocabulary, B blocks of L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.network.losses import token_losses
from model.network.packing import Documents

Checkpointing = Literal["off", "selective", "full"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_TNH, k_TKH, v_TKH -> what each query gathers (T, N, H)


class Architecture(BaseModel):
    """A model's architecture, without its vocabulary; names are Hugging Face's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="width of the feed-forward layers")
    num_hidden_layers: int = Field(gt=0, description="number of layers")
    num_attention_heads: int = Field(gt=0, description="number of query heads")
    num_key_value_heads: int = Field(gt=0, description="number of key/value heads; fewer than query heads if grouped")
    max_position_embeddings: int = Field(gt=1, description="context, tokens")
    rms_norm_eps: float = Field(gt=0, description="added to the mean square in RMSNorm")
    rope_theta: float = Field(gt=0, description="base of the rotary embedding's wavelengths")
    initializer_range: float = Field(gt=0, description="standard deviation of the initial weights")
    tie_word_embeddings: bool = Field(description="one matrix for input and output embeddings")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads ({heads})")
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads ({kv_heads})")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class RopeScaling(BaseModel):
    """How Llama 3.1 stretches the rotary embedding's long waves over a longer context; names are Hugging Face's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["llama3"]
    factor: float = Field(ge=1, description="by how much the longest waves are stretched")
    low_freq_factor: float = Field(gt=0, description="waves that fit fewer times into the first context are stretched")
    high_freq_factor: float = Field(gt=0, description="waves that fit more times into the first context are kept")
    original_max_position_embeddings: int = Field(gt=0, description="the first context, tokens")

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
        return self


class ModelConfig(Architecture):
    """A model: its architecture, its vocabulary, and the RoPE scaling that only models trained elsewhere have."""

    vocab_size: int = Field(gt=1, description="number of tokens in the vocabulary")
    rope_scaling: RopeScaling | None = None  # Llama 2 has none


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trained weights."""
    attention = 2 * config.hidden_size * config.head_size * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer + embeddings + config.hidden_size


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Return the floating-point operations of training on one token, forward and backward (PaLM, appendix B).

    6N + 12 L d T, as in flows/plan.py: the convention of published MFUs, so that ours compares with them and with the
    plan. It counts the input embedding, which is only looked up, and the masked half of attention, but not what
    activation checkpointing recomputes.
    """
    return 6 * num_parameters(config) + 12 * config.num_hidden_layers * config.hidden_size * context


def rotary_angles(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, both (T, 1, H), float32 (RoFormer, section 3.2.2).

    Pairs are (i, i + H/2), as in Hugging Face's weights; the first half of the sines is negated, as `rotate` needs it.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions_T.device) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling:
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = positions_T[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Lower frequencies as Llama 3.1 does: long waves by the factor, short ones not at all, others in part."""
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0.0, 1.0))


def rotate(x_TNH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head's pairs by the angles of its position, in float32; the two of a pair are half a head apart."""
    cos, sin = angles
    x_TNH = x_TNH.float()
    return torch.addcmul(x_TNH * cos, x_TNH.roll(x_TNH.shape[-1] // 2, dims=-1), sin)


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Return causal attention within each document, without storing weights or computing scores between documents.

    GPUs have one kernel for documents of any lengths, in half precision. Everywhere else it is one call for neighbours
    of the same length. On CPUs torch's kernel is slow in bfloat16: there, two products over blocks of short documents
    are twice as fast, in spite of the masked scores.
    """
    if q_TNH.is_cuda and v_TKH.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = documents.boundaries, documents.longest
        q_TNH, k_TKH = q_TNH.to(v_TKH.dtype), k_TKH.to(v_TKH.dtype)
        out = varlen_attn(q_TNH, k_TKH, v_TKH, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor), "only the output was requested"
        return out
    runs = documents.blocks if v_TKH.dtype == torch.bfloat16 else documents.runs
    sizes = [length * count for length, count, _ in runs]
    outs = []
    for (length, count, mask), *parts in zip(
        runs, *(torch.split(x, sizes) for x in (q_TNH, k_TKH, v_TKH)), strict=True
    ):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        if mask is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v.float(), is_causal=True, enable_gqa=True)
        else:
            out = _attend_within(q.to(v.dtype), k.to(v.dtype), v, mask)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _attend_within(q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask_B1LL: Tensor) -> Tensor:
    """Return attention among the L tokens of each of B blocks, as the mask allows."""
    groups = q_BNLH.shape[1] // k_BKLH.shape[1]
    k_BNLH, v_BNLH = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BKLH, v_BKLH))
    scores_BNLL = q_BNLH * q_BNLH.shape[-1] ** -0.5 @ k_BNLH.transpose(-1, -2) + mask_B1LL
    out_BNLH: Tensor = scores_BNLL.softmax(dim=-1) @ v_BNLH
    return out_BNLH


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return x scaled to a root mean square of 1, times the weights."""
        return nn.functional.rms_norm(x_TD, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.head_size = config.head_size
        kv_size = config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], attends: Attend) -> Tensor:
        """Return what each token gathers from the tokens that `attends` lets it see."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q_TNH, k_TKH, v_TKH = (project(x_TD).view(len(x_TD), -1, self.head_size) for project in projections)
        out_TNH = attends(rotate(q_TNH, angles), rotate(k_TKH, angles), v_TKH)
        out_TD: Tensor = self.o_proj(out_TNH.flatten(1).to(x_TD.dtype))
        return out_TD


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        out_TD: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out_TD


class Layer(nn.Module):
    """Attention and feed-forward, each on normalised input, each added to the residual stream."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], attends: Attend) -> Tensor:
        """Return the residual stream after this layer."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), angles, attends)
        out_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return out_TD


class Decoder(nn.Module):
    """The layers between tokens and hidden states."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.run_layer = CHECKPOINTING[checkpointing]

    def forward(self, ids_T: Tensor, documents: Documents) -> Tensor:
        """Return the hidden states (T, D)."""
        angles = rotary_angles(self.config, documents.positions)
        return self.run_layers(ids_T, angles, repeat(partial(attend, documents=documents)))

    def run_layers(self, ids_T: Tensor, angles: tuple[Tensor, Tensor], attends: Iterable[Attend]) -> Tensor:
        """Return the hidden states (T, D) at any positions, given how each layer attends (model/sampling)."""
        x_TD = self.embed_tokens(ids_T)
        for layer, layer_attends in zip(self.layers, attends, strict=False):
            x_TD = self.run_layer(layer, x_TD, angles, layer_attends)
        out_TD: Tensor = self.norm(x_TD)
        return out_TD


class Network(nn.Module):
    """A module described by a config.json."""

    config: ModelConfig


class Llama(Network):
    """A Llama 2 language model."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, checkpointing)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids_T: Tensor, documents: Documents, targets_T: Tensor | None = None) -> Tensor:
        """Return the logits (T, V) or, given targets, each token's loss (T,) in nats."""
        hidden_TD = self.model(ids_T, documents)
        if targets_T is not None:
            return token_losses(hidden_TD, self.lm_head, targets_T)
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV


def first_weights(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Return a parameter's initial value: ones for a norm, else normal.

    The projections that add to the residual stream start smaller, by the square root of their number, so that the
    stream does not grow with depth (GPT-2, section 2.3).
    """
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def _plain(layer: nn.Module, *arguments: object) -> Tensor:
    out: Tensor = layer(*arguments)
    return out


# Keep what is expensive to compute; recompute the rest in the backward pass (LLaMA, section 2.4).
_keep_matrix_products = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

CHECKPOINTING: dict[Checkpointing, Callable[..., Tensor]] = {
    "off": _plain,
    "selective": partial(checkpoint, use_reentrant=False, context_fn=_keep_matrix_products),
    "full": partial(checkpoint, use_reentrant=False),
}
