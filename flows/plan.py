"""What a run would take, without running it: parameters, memory, KV cache, tokens, FLOPs, days.

`plan(params)` is the text of `python -m flows.recipe --profile 7b --plan`. All above it are pure functions of plain
numbers. Neither torch nor DeepSpeed is imported: the numbers come from params.yaml, and the stage `pretrain`, which
reads the same keys, is the one that checks their ranges.

Sources: Llama 2 section 2.2 and table 2 (GPU hours); "ZeRO" (Rajbhandari et al. 2020) section 3 (memory of the states);
"Reducing Activation Recomputation" (Korthikanti et al. 2022) section 4 (way of counting activations); "PaLM" (Chowdhery
et al. 2022) appendix B (FLOPs and MFU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.stage import Machine, Section, parse_section

MIB = 2**20
GIB = 2**30
ZERO_STAGES = (0, 1, 2, 3)
ZERO_3_LIVE_PARAMETERS = 1_000_000_000  # gathered at once at most: DeepSpeed's `stage3_max_live_parameters`

Checkpointing = Literal["none", "selective", "full"]


class PlanParams(Section):
    """What `--plan` assumes about the hardware; nothing here changes a run."""

    device: str = Field(min_length=1, description="name of one training device: a GPU, or this machine's CPU")
    num_devices: int = Field(gt=0, description="training devices, all hosts together")
    peak_tflops: float = Field(gt=0, description="one device's peak in matrix products of the precision, TFLOP/s")
    memory_gib: float = Field(gt=0, description="memory of one device that torch can use, GiB")
    overhead_gib: float = Field(ge=0, description="what context, communication buckets, fragmentation take of it, GiB")
    mfu: float = Field(gt=0, le=1, description="assumed model FLOPs utilisation")
    reported_device_hours: float | None = Field(gt=0, description="device hours others report for it; null: none")


class Architecture(BaseModel):
    """The sizes that count, under their names in params.yaml and in a Hugging Face config.json."""

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


def num_layer_parameters(model: Architecture) -> dict[str, int]:
    """Return one layer's parameters by part: no biases, two RMSNorm gains, three matrices of SwiGLU."""
    return {
        "attention": 2 * model.hidden_size * (model.hidden_size + model.key_value_size),
        "feed-forward": 3 * model.hidden_size * model.intermediate_size,
        "norms": 2 * model.hidden_size,
    }


def num_parameters(model: Architecture) -> int:
    """Return the exact count: embedding, layers, last norm, and the output matrix where it is not the embedding."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return embeddings + model.num_hidden_layers * sum(num_layer_parameters(model).values()) + model.hidden_size


def state_bytes(num_parameters: int, bf16: bool, zero_stage: int, num_devices: int) -> dict[str, float]:
    """Return the bytes on one device of weights, gradients and optimiser states, and of what ZeRO 3 gathers.

    ZeRO, section 3 and figure 1, with 2 + 2 + 12 bytes a parameter for Adam in mixed precision (weights, gradients, fp32
    master weights and two moments), 4 + 4 + 8 in fp32, which needs no masters. Stage 1 divides the optimiser's share
    among the devices, stage 2 the gradients as well, stage 3 all; it then gathers the layers in use for a moment.
    """
    weight_bytes, optimizer_bytes = (2, 12) if bf16 else (4, 8)

    def share(from_stage: int) -> int:
        return num_devices if zero_stage >= from_stage else 1

    gathered = min(num_parameters, ZERO_3_LIVE_PARAMETERS) if zero_stage == 3 and num_devices > 1 else 0
    return {
        "weights": weight_bytes * num_parameters / share(3),
        "gradients": weight_bytes * num_parameters / share(2),
        "optimizer": optimizer_bytes * num_parameters / share(1),
        "gathered": weight_bytes * gathered,
    }


def activation_bytes(model: Architecture, checkpointing: Checkpointing, num_tokens: int, bf16: bool) -> int:
    """Return the bytes that the forward pass of one micro batch keeps for the backward pass, the logits left out.

    Counted as Korthikanti et al. section 4.1 do, in values a token and layer, for this architecture: no dropout, SwiGLU,
    grouped queries, attention weights never stored. With h the width, k the width of the keys, f that of SwiGLU:

    - none: each norm's input and output (4h), queries, keys, values (h + 2k), attention's output (h), gate, up, the
      gate's SiLU and the product (4f)
    - selective: the layer's input (h) and the outputs of matrix products and attention: queries, keys, values (h + 2k),
      attention (h), its projection (h), gate, up (2f), down (h); the rest is computed again (LLaMA section 2.4)
    - full: the layer's input (h); one layer at a time is computed again, and holds what `none` holds
    """
    h, k, f = model.hidden_size, model.key_value_size, model.intermediate_size
    without = 6 * h + 2 * k + 4 * f
    a_layer = {"none": without, "selective": 5 * h + 2 * k + 2 * f, "full": h}[checkpointing]
    once = 0 if checkpointing == "none" else without - a_layer
    return (2 if bf16 else 4) * num_tokens * (model.num_hidden_layers * a_layer + once)


def logits_bytes(model: Architecture, num_tokens: int, bf16: bool) -> int:
    """Return the bytes of one micro batch's logits: as computed, in fp32, and their gradient in fp32."""
    return num_tokens * model.vocab_size * ((2 if bf16 else 4) + 4 + 4)


def key_value_cache_bytes(model: Architecture, num_key_value_heads: int, bf16: bool) -> int:
    """Return the bytes of one sequence's keys and values at full context (Llama 2, section A.2.1)."""
    head_size = model.hidden_size // model.num_attention_heads
    values = 2 * model.num_hidden_layers * num_key_value_heads * head_size * model.max_position_embeddings
    return (2 if bf16 else 4) * values


def token_flops(model: Architecture) -> int:
    """Return the FLOPs to train on one token: 6N + 12 L d T (PaLM, appendix B).

    6N for the matrices, forward and backward; the rest for attention over a full context of T tokens, not halved for
    being causal. What activation checkpointing computes again doesn't count: MFU looks at useful work.
    """
    attention = 12 * model.num_hidden_layers * model.hidden_size * model.max_position_embeddings
    return 6 * num_parameters(model) + attention


def device_hours(flops: float, peak_tflops: float, mfu: float) -> float:
    """Return how many hours of one device the FLOPs take."""
    return flops / (peak_tflops * 1e12 * mfu) / 3600


def implied_mfu(flops: float, peak_tflops: float, hours: float) -> float:
    """Return the share of their peak that devices reached which did the FLOPs in so many device hours."""
    return flops / (peak_tflops * 1e12 * hours * 3600)


class Training(Architecture):
    """The keys of `pretrain` that decide memory and time, beside the sizes."""

    batch_tokens: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    zero_stage: Literal[0, 1, 2, 3]
    precision: Literal["bf16", "fp32"]
    activation_checkpointing: Checkpointing

    @property
    def bf16(self) -> bool:
        """Whether weights are held in bf16, with fp32 masters."""
        return self.precision == "bf16"


class Stream(BaseModel):
    """The key of `tokenize` that decides how long training takes: each token of the stream is used once."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_tokens: int = Field(gt=0)


def plan(params: Mapping[str, Any]) -> str:
    """Return the plan of `pretrain` with these parameters, to be read in a terminal.

    Raises ValueError, naming the parameter, when `plan` or a key of `pretrain` that it needs is missing or wrong.
    """
    assumed = parse_section(PlanParams, params, "plan")
    training = parse_section(Training, params, "pretrain")
    num_ranks = parse_section(Machine, params, "machine").num_ranks
    blocks = [
        _model_block(training),
        _memory_block(training, assumed),
        _cache_block(training),
        _time_block(training, assumed, parse_section(Stream, params, "tokenize").num_tokens),
        _batch_block(training, assumed, num_ranks),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>24}  {note}".rstrip()


def _model_block(model: Architecture) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in num_layer_parameters(model).items())
    return [
        "Model",
        _row("parameters", f"{num_parameters(model):,}", "exact, embedding and output matrix included"),
        _row("layers", f"{model.num_hidden_layers:,}"),
        _row("  parameters of one", f"{sum(num_layer_parameters(model).values()):,}", parts),
        _row("width", f"{model.hidden_size:,}", f"{model.intermediate_size:,} in SwiGLU"),
        _row("heads", f"{model.num_attention_heads:,}", f"{model.num_key_value_heads} for keys and values"),
        _row("vocabulary", f"{model.vocab_size:,}"),
        _row("context", f"{model.max_position_embeddings:,}", "tokens"),
    ]


def _memory_block(training: Training, assumed: PlanParams) -> list[str]:
    tokens = training.micro_batch_size * training.max_position_embeddings
    precision = training.precision
    names = {
        "weights": f"weights, {precision}",
        "gradients": f"gradients, {precision}",
        "optimizer": "masters, moments, fp32" if training.bf16 else "moments, fp32",
        "gathered": "gathered weights, at most",
        "activations": "activations",
        "logits": "logits",
        "overhead": "overhead (assumed)",
    }
    columns = [
        {
            **state_bytes(num_parameters(training), training.bf16, stage, assumed.num_devices),
            "activations": activation_bytes(training, training.activation_checkpointing, tokens, training.bf16),
            "logits": logits_bytes(training, tokens, training.bf16),
            "overhead": assumed.overhead_gib * GIB,
        }
        for stage in ZERO_STAGES
    ]
    sums = [sum(column.values()) / GIB for column in columns]
    fits = ["yes" if total <= assumed.memory_gib else "no" for total in sums]
    titles = [f"ZeRO {stage}{' *' if stage == training.zero_stage else ''}" for stage in ZERO_STAGES]
    micro_batch = f"{training.micro_batch_size} x {training.max_position_embeddings:,} tokens"
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


def _cache_block(model: Training) -> list[str]:
    own = key_value_cache_bytes(model, model.num_attention_heads, model.bf16)
    grouped = key_value_cache_bytes(model, model.num_key_value_heads, model.bf16)
    return [
        f"KV cache of one sequence of {model.max_position_embeddings:,} tokens, {model.precision}",
        _row(f"with {model.num_attention_heads} heads", f"{own:,} B", f"{own / MIB:,g} MiB, without grouped queries"),
        _row(
            f"with {model.num_key_value_heads} heads",
            f"{grouped:,} B",
            f"{grouped / MIB:,g} MiB, this model: {own / grouped:g} x smaller",
        ),
    ]


def _time_block(training: Training, assumed: PlanParams, num_tokens: float) -> list[str]:
    a_token = token_flops(training)
    flops = a_token * num_tokens
    hours = device_hours(flops, assumed.peak_tflops, assumed.mfu)
    block = [
        "Time",
        _row("tokens", f"{num_tokens:,.0f}", f"{num_tokens / num_parameters(training):.1f} a parameter"),
        _row("steps", f"{num_tokens / training.batch_tokens:,.0f}", f"of {training.batch_tokens:,} tokens"),
        _row("FLOPs a token", f"{a_token:.4g}", "6N + 12 L d T, not counting what is computed again"),
        _row("FLOPs", f"{flops:.4g}"),
        _row("peak of one device", f"{assumed.peak_tflops:g} TFLOP/s", assumed.device),
        _row("MFU", f"{assumed.mfu:.1%}", "assumed"),
        _row("device hours", f"{hours:,.1f}"),
        _row("days", f"{hours / assumed.num_devices / 24:,.3g}", f"of {assumed.num_devices:,} x {assumed.device}"),
    ]
    if assumed.reported_device_hours is not None:
        reported = assumed.reported_device_hours
        reached = implied_mfu(flops, assumed.peak_tflops, reported)
        days = reported / assumed.num_devices / 24
        block += [
            _row("reported device hours", f"{reported:,.0f}", f"{days:,.3g} days of as many"),
            _row("MFU that implies", f"{reached:.1%}", f"this plan says {hours / reported:.2f} x the reported hours"),
        ]
    return block


def _batch_block(training: Training, assumed: PlanParams, num_ranks: int) -> list[str]:
    sequences = training.batch_tokens // training.max_position_embeddings
    micro_batches = sequences // training.micro_batch_size
    return [
        "Batch",
        _row("sequences", f"{sequences:,}", f"of {training.max_position_embeddings:,} tokens"),
        _row("micro batches", f"{micro_batches:,}", f"of {training.micro_batch_size:,}, to divide among the devices"),
        _row("hosts", f"{-(-assumed.num_devices // num_ranks):,}", f"of {num_ranks} devices (machine.num_ranks)"),
        _row("accumulation", *_accumulation(micro_batches, assumed.num_devices)),
    ]


def _accumulation(num_micro_batches: int, num_devices: int) -> tuple[str, str]:
    if num_micro_batches % num_devices == 0:
        return f"{num_micro_batches // num_devices:,}", "micro batches of each device before a step"
    most = largest_divisor(num_micro_batches, num_devices)
    return "none", f"does NOT divide among {num_devices:,} devices: at most {most:,} can train"


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of a number that is not above a limit: how many devices can share its micro batches."""
    return next(candidate for candidate in range(at_most, 0, -1) if number % candidate == 0)
