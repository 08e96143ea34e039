"""Compare sampling with transformers' `generate`.

    pip install 'transformers>=5.0'
    OMP_WAIT_POLICY=passive python -m benchmarks.sampling [batch] [ends] [large] [prefix]

Everything runs on the CPU, with as many threads as processors. Both sides use the same weights, prompts, lengths and
threads, and take turns; the ratio is the median over the turns. No response ends before its length on either side;
prompts are padded on the left for `generate`, whose attention is torch's sdpa. Each part prints a table in a few
minutes.

- batch: the default model of params.yaml, 32 rows, same dtype; responses of one length.
- ends: the same with 128 prompts, of 64 to 224 tokens in a random order, each answered up to the end of a context of
  256, as responses end in practice: `generate` waits for the longest of 32; here the next prompt takes the row.
- large: 50M parameters, 32 rows, each side in its fastest dtype.
- prefix: 8 samples of one prompt of 256 tokens in a context of 512, both models, same dtype.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.turns import run_parts
from model.network.transformer import Llama, ModelConfig, first_weights, num_parameters
from model.sampling.sampler import Sampling, sample

TURNS = 5
SIZES: dict[str, dict[str, int]] = {
    "default": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 256,
    },
    "50M": {
        "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 10,
        "num_key_value_heads": 10, "vocab_size": 8000, "max_position_embeddings": 512,
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0},
    "temperature 1": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "temperature 0.6, top-p 0.9": {"temperature": 0.6, "top_p": 0.9, "top_k": 0},  # Llama 2-Chat's own
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def both_models(size: str, dtype: torch.dtype, **changes: int) -> tuple[Llama, Any]:
    """Return our model and transformers' with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ModelConfig.model_validate(
        {
            **SIZES[size], "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.06,
            "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip
    ours, generator = Llama(config, "off"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(first_weights(name, parameter.shape, config, generator))
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa"))
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype).eval()


def prompts_of(config: ModelConfig, lengths: Sequence[int]) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run_ours(model: Llama, prompts: list[list[int]], count: int, num_new: int, setting: str, rows: int) -> list[int]:
    """Return the lengths of the responses, `count` per prompt, each up to `num_new` tokens or the context's end."""
    sampling = Sampling.model_validate({**SETTINGS[setting], "max_new_tokens": num_new})
    responses = sample(
        model, prompts, sampling, num_samples=count, eos_id=-1, seeds=range(len(prompts)), max_rows=rows,
        description=None,
    )  # fmt: skip
    return [len(response.ids) for group in responses for response in group]


def run_theirs(model: Any, prompts: list[list[int]], count: int, num_new: int, setting: str, rows: int) -> list[int]:
    """Return the same for `generate`, batch by batch; it stops when the longest response is complete."""
    context, lengths = model.config.max_position_embeddings, []
    drawn = {"do_sample": True, **SETTINGS[setting]} if SETTINGS[setting]["temperature"] else {"do_sample": False}
    for first in range(0, len(prompts), rows // count):
        batch = prompts[first : first + rows // count]
        rooms = [min(num_new, context - len(prompt)) for prompt in batch]
        longest = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(
            ids, attention_mask=seen, min_new_tokens=max(rooms), max_new_tokens=max(rooms),
            num_return_sequences=count, eos_token_id=None, pad_token_id=0, **drawn,
        )  # fmt: skip
        assert out.shape == (len(batch) * count, longest + max(rooms))
        lengths += [room for room in rooms for _ in range(count)]
    return lengths


def compare(
    size: str, ours: str, theirs: str, lengths: Sequence[int], count: int, num_new: int, setting: str, **changes: int
) -> str:
    """Return a row of a table: both sides' tokens per second, and the median ratio of their turns."""
    rows = min(32, len(lengths) * count)
    model, _ = both_models(size, DTYPES[ours], **changes)
    _, their_model = both_models(size, DTYPES[theirs], **changes)
    prompts = prompts_of(model.config, lengths)
    sides = (
        lambda: run_ours(model, prompts, count, num_new, setting, rows),
        lambda: run_theirs(their_model, prompts, count, num_new, setting, rows),
    )
    expected = [min(num_new, model.config.max_position_embeddings - length) for length in lengths for _ in range(count)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):
        for side, times in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            found = side()
            if turn:  # the first is a warm-up
                times.append(time.perf_counter() - started)
            assert found == expected
    written = sum(expected)
    here, there = (written / statistics.median(times) for times in seconds)
    ratio = statistics.median(slow / fast for fast, slow in zip(*seconds, strict=True))
    return (
        f"| {num_parameters(model.config):,} | {ours} | {theirs} | {setting} | {min(lengths)} to {max(lengths)} "
        f"| {len(lengths)} x {count} | {min(expected)} to {max(expected)} | {here:,.0f} | {there:,.0f} | {ratio:.2f} |"
    )


def print_head() -> None:
    """Print the header of a table."""
    print(
        "| parameters | here | generate | setting | tokens of a prompt | prompts x samples "
        "| new tokens | here, tokens/s | generate, tokens/s | ratio |\n" + "| --- " * 10 + "|"
    )


def compare_batch() -> None:
    """Compare the default model on 32 rows."""
    print_head()
    for dtype, setting in itertools.product(DTYPES, SETTINGS):
        print(compare("default", dtype, dtype, [64] * 32, 1, 128, setting), flush=True)


def compare_ends() -> None:
    """Compare the default model on 32 rows, with responses of different lengths."""
    print_head()
    lengths = torch.randint(64, 225, (128,), generator=torch.Generator().manual_seed(3)).tolist()
    for dtype, setting in itertools.product(DTYPES, SETTINGS):
        print(compare("default", dtype, dtype, lengths, 1, 256, setting), flush=True)


def compare_large() -> None:
    """Compare 50M parameters on 32 rows, in both dtypes: the table shows which is best."""
    print_head()
    for dtype in DTYPES:
        print(compare("50M", dtype, dtype, [64] * 32, 1, 64, "temperature 0.6, top-p 0.9"), flush=True)


def compare_prefix() -> None:
    """Compare both models on 8 samples of one prompt, some short, some up to the context's end."""
    print_head()
    for dtype, num_new in itertools.product(DTYPES, (64, 256)):
        for setting in ("temperature 1", "temperature 0.6, top-p 0.9"):
            row = compare("default", dtype, dtype, [256], 8, num_new, setting, max_position_embeddings=512)
            print(row, flush=True)
    for dtype in DTYPES:
        print(compare("50M", dtype, dtype, [256], 8, 64, "temperature 0.6, top-p 0.9"), flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "batch": compare_batch,
    "ends": compare_ends,
    "large": compare_large,
    "prefix": compare_prefix,
}


if __name__ == "__main__":
    run_parts(PARTS, "transformers")
