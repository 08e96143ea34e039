"""What a run would take, without running it: parameters, memory, KV cache, tokens, FLOPs, days.

`plan(params)` is the text of `python -m flows.recipe --profile 7b --plan`. All functions above it are pure functions of
plain numbers. Neither torch nor DeepSpeed is imported: the numbers come from params.yaml, and the stage `pretrain`,
which reads the same keys, checks their ranges.

Sources: Llama 2 section 2.2 and table 2 (GPU hours); "ZeRO" (Rajbhandari et al. 2020) section 3 (memory of the states);
"Reducing Activation Recomputation" (Korthikanti et al. 2022) section 4 (way of counting activations); "PaLM" (Chowdhery
et al. 2022) appendix B (FLOPs and MFU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.running.params import Machine, Section, num_ranks_of, parse_section

MIB = 2**20
GIB = 2**30
ZERO_STAGES = (0, 1, 2, 3)
ZERO_3_LIVE_PARAMETERS = 1_000_000_000  # most that are gathered at once: DeepSpeed's `stage3_max_live_parameters`

Precision = Literal["fp32", "bf16"]
Checkpointing = Literal["off", "selective", "full"]


class PlanParams(Section):
    """What `--plan` assumes about the hardware; nothing here changes a run."""

    device: str = Field(min_length=1, description="name of one training device: a GPU, or this machine's CPU")
    num_devices: int = Field(gt=0, description="training devices on all hosts together")
    peak_tflops: float = Field(gt=0, description="one device's peak for matrix products in this precision, TFLOP/s")
    memory_gib: float = Field(gt=0, description="memory of one device that torch can use, GiB")
    overhead_gib: float = Field(ge=0, description="its share for context, communication buckets, fragmentation, GiB")
    mfu: float = Field(gt=0, le=1, description="assumed model FLOPs utilisation")
    reported_device_hours: float | None = Field(gt=0, description="device hours others report for it; null: none")


class Sizes(BaseModel):
    """The sizes that matter here, named as in params.yaml and in a Hugging Face config.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def key_value_size(self) -> int:
        """Width of all keys (or values) of one token in one layer."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads


def num_layer_parameters(sizes: Sizes) -> dict[str, int]:
    """Return one layer's parameters by part: no biases, two RMSNorm gains, three matrices of SwiGLU."""
    return {
        "attention": 2 * sizes.hidden_size * (sizes.hidden_size + sizes.key_value_size),
        "feed-forward": 3 * sizes.hidden_size * sizes.intermediate_size,
        "norms": 2 * sizes.hidden_size,
    }


def num_parameters(sizes: Sizes) -> int:
    """Return the exact count: embedding, layers, last norm, and the output matrix where it is not the embedding."""
    embeddings = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)
    return embeddings + sizes.num_hidden_layers * sum(num_layer_parameters(sizes).values()) + sizes.hidden_size


def bytes_a_parameter(precision: Precision, zero_stage: int) -> dict[str, int]:
    """Return the bytes that Adam takes per parameter: ZeRO's 2 + 2 + 12 in mixed precision, 4 + 4 + 8 in fp32.

    The 12 are fp32 master weights and two moments; fp32 needs no masters. With bf16 weights, gradients take 2 bytes at
    stage 0 and 4 above, where model/training/engine.py accumulates them in fp32.
    """
    if precision == "fp32":
        return {"weights": 4, "gradients": 4, "optimizer": 8}
    return {"weights": 2, "gradients": 2 if zero_stage == 0 else 4, "optimizer": 12}


def state_bytes(
    num_parameters: int, each: Mapping[str, int], zero_stage: int, num_devices: int, offload: bool
) -> dict[str, float]:
    """Return the bytes on one device of weights, gradients and optimiser states, and of what ZeRO 3 gathers.

    ZeRO, section 3 and figure 1: stage 1 shards the optimiser states over the devices, stage 2 also the gradients,
    stage 3 also the weights, and briefly gathers those of the layers in use. Offloaded states take no device memory.
    """

    def share(from_stage: int) -> float:
        return num_parameters / (num_devices if zero_stage >= from_stage else 1)

    gathered = min(num_parameters, ZERO_3_LIVE_PARAMETERS) if zero_stage == 3 and num_devices > 1 else 0
    return {
        "weights": each["weights"] * share(3),
        "gradients": each["gradients"] * share(2),
        "optimizer": 0 if offload and zero_stage > 0 else each["optimizer"] * share(1),
        "gathered": each["weights"] * gathered,
    }


def activation_bytes(sizes: Sizes, checkpointing: Checkpointing, num_tokens: int, bf16: bool) -> int:
    """Return the bytes that the layers keep of one micro batch from the forward pass for the backward pass.

    Counted as in Korthikanti et al., section 4.1, but for this architecture: no dropout, SwiGLU, grouped queries,
    attention weights never stored. In values per token and layer; h is the width, k the keys' width, f SwiGLU's:

    - off: each norm's input and output (4h), queries, keys, values (h + 2k), attention (h), gate, its SiLU, up, their
      product (4f). That is with a GPU's fused kernels; on a CPU norms and attention keep up to 1.6 times the sum.
    - selective: the layer's input (h) and the matrix products: queries, keys, values (h + 2k), attention's projection
      (h), gate, up (2f), down (h); the rest is recomputed (LLaMA, section 2.4).
    - full: the layer's input (h).

    During recomputation, one layer at a time holds what `off` holds.
    """
    h, k, f = sizes.hidden_size, sizes.key_value_size, sizes.intermediate_size
    off = 6 * h + 2 * k + 4 * f
    a_layer = {"off": off, "selective": 4 * h + 2 * k + 2 * f, "full": h}[checkpointing]
    return (2 if bf16 else 4) * num_tokens * (sizes.num_hidden_layers * a_layer + off - a_layer)


def loss_bytes(vocab_size: int, num_tokens: int) -> int:
    """Return the bytes that the loss keeps of one micro batch: each token's log-probabilities, in fp32."""
    return 4 * num_tokens * vocab_size


def key_value_cache_bytes(sizes: Sizes, num_key_value_heads: int, bf16: bool) -> int:
    """Return the bytes of one sequence's keys and values at full context (Llama 2, section A.2.1)."""
    head_size = sizes.hidden_size // sizes.num_attention_heads
    values = 2 * sizes.num_hidden_layers * num_key_value_heads * head_size * sizes.max_position_embeddings
    return (2 if bf16 else 4) * values


def token_flops(sizes: Sizes) -> int:
    """Return the FLOPs to train on one token: 6N + 12 L d T (PaLM, appendix B).

    6N for the matrices, forward and backward; the rest for attention over a full context of T tokens, not halved for
    causality. What activation checkpointing recomputes doesn't count: MFU measures useful work. Published MFUs use this
    count, and so does the one that training logs (`flops_per_token` in model/network/transformer.py).
    """
    attention = 12 * sizes.num_hidden_layers * sizes.hidden_size * sizes.max_position_embeddings
    return 6 * num_parameters(sizes) + attention


def device_hours(flops: float, peak_tflops: float, mfu: float) -> float:
    """Return how many hours of one device the FLOPs take."""
    return flops / (peak_tflops * 1e12 * mfu) / 3600


def implied_mfu(flops: float, peak_tflops: float, hours: float) -> float:
    """Return the share of their peak that devices reached if they did the FLOPs in this many device hours."""
    return flops / (peak_tflops * 1e12 * hours * 3600)


class Training(Sizes):
    """The keys of `pretrain` that decide memory and time, besides the sizes."""

    batch_rows: int = Field(gt=0)
    micro_batch_rows: int = Field(gt=0)
    zero_stage: Literal[0, 1, 2, 3]
    precision: Precision
    offload: Literal["none", "cpu"]
    activation_checkpointing: Checkpointing

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are held in bf16."""
        return self.precision == "bf16"

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimiser step, over all devices."""
        return self.batch_rows * self.max_position_embeddings


class Vocabulary(BaseModel):
    """The key of `train_tokenizer` that decides the size of both embeddings."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int = Field(gt=0)


class Stream(BaseModel):
    """The key of `tokenize` that decides how long training takes: each token of the stream is used once."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_tokens: int = Field(gt=0)


def plan(params: Mapping[str, Any]) -> str:
    """Return the plan of `pretrain` with these parameters, as text for a terminal.

    Raises ValueError, naming the parameter, when `plan` or a key of `pretrain` that it needs is missing or wrong.
    """
    assumed = parse_section(PlanParams, params, "plan")
    training = parse_section(Training, _with_vocabulary(params), "pretrain")
    num_ranks = num_ranks_of(params, "pretrain", parse_section(Machine, params, "machine"))
    blocks = [
        _model_block(training),
        _memory_block(training, assumed),
        _cache_block(training),
        _time_block(training, assumed, parse_section(Stream, params, "tokenize").num_tokens),
        _batch_block(training, assumed.num_devices, num_ranks),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def read_sizes(params: Mapping[str, Any]) -> Sizes:
    """Return the sizes of the model that `pretrain` trains; its vocabulary is the tokenizer's."""
    return parse_section(Sizes, _with_vocabulary(params), "pretrain")


def _with_vocabulary(params: Mapping[str, Any]) -> Mapping[str, Any]:
    vocab_size = parse_section(Vocabulary, params, "train_tokenizer").vocab_size
    return {name: {**params[name], "vocab_size": vocab_size} for name in ("pretrain",) if name in params}


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>24}  {note}".rstrip()


def _model_block(sizes: Sizes) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in num_layer_parameters(sizes).items())
    return [
        "Model",
        _row("parameters", f"{num_parameters(sizes):,}", "exact, embedding and output matrix included"),
        _row("layers", f"{sizes.num_hidden_layers:,}"),
        _row("  parameters of one", f"{sum(num_layer_parameters(sizes).values()):,}", parts),
        _row("width", f"{sizes.hidden_size:,}", f"{sizes.intermediate_size:,} in SwiGLU"),
        _row("heads", f"{sizes.num_attention_heads:,}", f"{sizes.num_key_value_heads} for keys and values"),
        _row("vocabulary", f"{sizes.vocab_size:,}"),
        _row("context", f"{sizes.max_position_embeddings:,}", "tokens"),
    ]


def _memory_block(training: Training, assumed: PlanParams) -> list[str]:
    tokens = training.micro_batch_rows * training.max_position_embeddings
    precision = training.precision
    names = {
        "weights": f"weights, {precision}",
        "gradients": "gradients",
        "optimizer": "masters, moments, fp32" if training.bf16 else "moments, fp32",
        "gathered": "gathered weights, at most",
        "activations": "activations",
        "loss": "loss, fp32",
        "overhead": "overhead (assumed)",
    }
    columns = [
        {
            **state_bytes(
                num_parameters(training),
                bytes_a_parameter(precision, stage),
                stage,
                assumed.num_devices,
                offload=training.offload == "cpu",
            ),
            "activations": activation_bytes(training, training.activation_checkpointing, tokens, training.bf16),
            "loss": loss_bytes(training.vocab_size, tokens),
            "overhead": assumed.overhead_gib * GIB,
        }
        for stage in ZERO_STAGES
    ]
    sums = [sum(column.values()) / GIB for column in columns]
    fits = ["yes" if total <= assumed.memory_gib else "no" for total in sums]
    titles = [f"ZeRO {stage}{' *' if stage == training.zero_stage else ''}" for stage in ZERO_STAGES]
    micro_batch = f"{training.micro_batch_rows} x {training.max_position_embeddings:,} tokens"
    return [
        f"Memory of one device, GiB ({assumed.num_devices:,} x {assumed.device}; * the chosen stage)",
        _columns("", titles),
        *(_columns(name, [f"{column[part] / GIB:,.3f}" for column in columns]) for part, name in names.items()),
        _columns("sum", [f"{total:,.3f}" for total in sums]),
        _columns(f"fits in {assumed.memory_gib:g}", fits),
        f"  activations: micro batch {micro_batch}, checkpointing `{training.activation_checkpointing}`",
    ]


def _columns(name: str, values: Sequence[str]) -> str:
    return f"  {name:<26}" + "".join(f"{value:>12}" for value in values)


def _cache_block(training: Training) -> list[str]:
    own = key_value_cache_bytes(training, training.num_attention_heads, training.bf16)
    grouped = key_value_cache_bytes(training, training.num_key_value_heads, training.bf16)
    smaller = f"with: {own / grouped:g} x smaller" if grouped < own else "with: this model has none"
    return [
        f"KV cache of one sequence of {training.max_position_embeddings:,} tokens, {training.precision}",
        _row(f"{training.num_attention_heads} heads", f"{own:,} B", f"{own / MIB:,g} MiB, without grouped queries"),
        _row(f"{training.num_key_value_heads} heads", f"{grouped:,} B", f"{grouped / MIB:,g} MiB, {smaller}"),
    ]


def _time_block(training: Training, assumed: PlanParams, num_tokens: float) -> list[str]:
    a_token = token_flops(training)
    flops = a_token * num_tokens
    hours = device_hours(flops, assumed.peak_tflops, assumed.mfu)
    block = [
        "Time",
        _row("tokens", f"{num_tokens:,.0f}", f"{num_tokens / num_parameters(training):.1f} per parameter"),
        _row("steps", f"{num_tokens / training.batch_tokens:,.0f}", f"of {training.batch_tokens:,} tokens"),
        _row("FLOPs per token", f"{a_token:.4g}", "6N + 12 L d T, not counting recomputation"),
        _row("FLOPs", f"{flops:.4g}"),
        _row("peak of one device", f"{assumed.peak_tflops:g} TFLOP/s", assumed.device),
        _row("MFU", f"{assumed.mfu:.1%}", "assumed, of the FLOPs above"),
        _row("device hours", f"{hours:,.2f}"),
        _row("days", f"{hours / assumed.num_devices / 24:,.3g}", f"of {assumed.num_devices:,} x {assumed.device}"),
    ]
    if assumed.reported_device_hours is not None:
        reported = assumed.reported_device_hours
        reached = implied_mfu(flops, assumed.peak_tflops, reported)
        days = reported / assumed.num_devices / 24
        block += [
            _row("reported device hours", f"{reported:,.0f}", f"{days:,.3g} days of as many devices"),
            _row("implied MFU", f"{reached:.1%}", f"this plan says {hours / reported:.2f} x the reported hours"),
        ]
    return block


def _batch_block(training: Training, num_devices: int, num_ranks: int) -> list[str]:
    micro_batches = training.batch_rows // training.micro_batch_rows
    return [
        "Batch",
        _row("rows", f"{training.batch_rows:,}", f"of {training.max_position_embeddings:,} tokens"),
        _row("micro batches", f"{micro_batches:,}", f"of {training.micro_batch_rows:,}, to divide among the devices"),
        _row("hosts", f"{-(-num_devices // num_ranks):,}", f"of {num_ranks} devices (machine.num_ranks)"),
        _row("accumulation", *_accumulation(micro_batches, num_devices)),
    ]


def _accumulation(num_micro_batches: int, num_devices: int) -> tuple[str, str]:
    if num_micro_batches % num_devices == 0:
        return f"{num_micro_batches // num_devices:,}", "micro batches of each device before a step"
    most = largest_divisor(num_micro_batches, num_devices)
    return "none", f"does NOT divide among {num_devices:,} devices: at most {most:,} can train"


def largest_divisor(number: int, at_most: int) -> int:
    """Return a number's largest divisor up to a limit: how many devices can share this many micro batches."""
    return next(candidate for candidate in range(at_most, 0, -1) if number % candidate == 0)
