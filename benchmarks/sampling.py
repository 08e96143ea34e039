"""Sampling against transformers' `generate`.

    pip install 'transformers>=5.0'
    OMP_WAIT_POLICY=passive python -m benchmarks.sampling [batch] [large] [prefix]

All on the CPU, on as many threads as there are processors; same weights, prompts, lengths, threads on both sides, which
take turns, and the ratio is the median over the turns. No response ends before its length on either side; prompts are
padded on the left for `generate`, whose attention is torch's sdpa. Each part prints a table in a few minutes.

- batch: the default model of params.yaml, 32 rows, same dtype.
- large: 50M parameters, 32 rows, each side in the dtype that it is fastest in.
- prefix: 8 samples of one prompt of 256 tokens in a context of 512, same dtype.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from model.sampling import Sampling, sample
from model.transformer import Llama, ModelConfig, first_weights, num_parameters

TURNS = 7
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
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9, "top_k": 0},
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


def run_ours(model: Llama, prompts: list[list[int]], count: int, num_new: int, setting: str) -> list[list[int]]:
    """Return responses of `num_new` tokens, `count` a prompt."""
    sampling = Sampling.model_validate({**SETTINGS[setting], "max_new_tokens": num_new})
    responses = sample(
        model, prompts, sampling, num_samples=count, eos_id=-1, seeds=range(len(prompts)),
        max_rows=len(prompts) * count, description=None,
    )  # fmt: skip
    return [response.ids for group in responses for response in group]


def run_theirs(model: Any, prompts: list[list[int]], count: int, num_new: int, setting: str) -> list[list[int]]:
    """Return the same by `generate`."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"do_sample": True, **SETTINGS[setting]} if SETTINGS[setting]["temperature"] else {"do_sample": False}
    out = model.generate(
        ids, attention_mask=seen, min_new_tokens=num_new, max_new_tokens=num_new, num_return_sequences=count,
        eos_token_id=None, pad_token_id=0, **drawn,
    )  # fmt: skip
    return [[int(token) for token in row] for row in out[:, longest:]]


def compare(size: str, ours: str, theirs: str, lengths: Sequence[int], count: int, num_new: int, setting: str,
            **changes: int) -> str:  # fmt: skip
    """Return a row of a table: tokens a second of both, and the median ratio of their turns."""
    model, _ = both_models(size, DTYPES[ours], **changes)
    _, their_model = both_models(size, DTYPES[theirs], **changes)
    prompts = prompts_of(model.config, lengths)
    sides: tuple[Callable[[], list[list[int]]], ...] = (
        lambda: run_ours(model, prompts, count, num_new, setting),
        lambda: run_theirs(their_model, prompts, count, num_new, setting),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):
        for side, times in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            ids = side()
            if turn:  # the first one warms up
                times.append(time.perf_counter() - started)
            assert [len(response) for response in ids] == [num_new] * (len(prompts) * count)
    written = len(prompts) * count * num_new
    here, there = (written / statistics.median(times) for times in seconds)
    ratio = statistics.median(slow / fast for fast, slow in zip(*seconds, strict=True))
    return (
        f"| {num_parameters(model.config):,} | {ours} | {theirs} | {setting} | {min(lengths)} to {max(lengths)} "
        f"| {len(lengths)} x {count} x {num_new} | {here:,.0f} | {there:,.0f} | {ratio:.2f} |"
    )


def print_head() -> None:
    """Print the head of a table."""
    print(
        "| parameters | here | generate | setting | tokens of a prompt | prompts x samples x new tokens "
        "| here, tokens/s | generate, tokens/s | ratio |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )


def compare_batch() -> None:
    """Print 32 rows of the default model, prompts of equal and of unequal lengths."""
    print_head()
    for dtype in DTYPES:
        for setting in SETTINGS:
            print(compare("default", dtype, dtype, [64] * 32, 1, 128, setting), flush=True)
    for dtype in DTYPES:
        print(compare("default", dtype, dtype, range(33, 97, 2), 1, 128, "temperature 1"), flush=True)


def compare_large() -> None:
    """Print 32 rows of 50M parameters; both dtypes of each, to see the best."""
    print_head()
    for ours, theirs in (("bf16", "bf16"), ("fp32", "fp32")):
        print(compare("50M", ours, theirs, [64] * 32, 1, 64, "temperature 1"), flush=True)


def compare_prefix() -> None:
    """Print 8 samples of one prompt."""
    print_head()
    for dtype in DTYPES:
        for setting in ("temperature 1", "temperature 1, top-p 0.9"):
            row = compare("default", dtype, dtype, [256], 8, 256, setting, max_position_embeddings=512)
            print(row, flush=True)


PARTS: dict[str, Callable[[], None]] = {"batch": compare_batch, "large": compare_large, "prefix": compare_prefix}


def main() -> None:
    """Run the parts named on the command line, or all."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in sys.argv[1:] or PARTS:
        print(f"\n### {name}\n")
        PARTS[name]()


if __name__ == "__main__":
    main()
