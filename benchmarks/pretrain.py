"""Compare pretraining with Hugging Face's Trainer, and measure what DeepSpeed adds to a step.

    pip install 'accelerate>=1.10' 'transformers>=5.0'
    OMP_WAIT_POLICY=passive python -m benchmarks.pretrain [parity] [speed] [loss] [overhead]

Everything runs on the CPU, with as many threads as processors. Each part runs alone in a few minutes, prints a table,
and times its candidates in turns, step by step where possible, so that other load on the machine affects all alike.

- parity: maximum difference of the logits from transformers' LlamaForCausalLM, same weights and ids.
- speed: tokens per second against the Trainer in the same precision: same weights, ids, batch, optimiser, threads.
- loss: seconds to the same validation loss, each with the settings that reach it soonest: bf16 weights with float32
  masters here; for the Trainer the best of float32, bf16 autocast and bf16 weights.
- overhead: DeepSpeed's step against a plain loop that does the same.

The text is drawn from a bigram model, and each document fills a row, so both sides learn the same from each step.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.turns import Clock, run_parts, train_in_turns
from model.network.packing import Batch, Shards, Starts, batch_of_rows
from model.network.ranks import join_ranks
from model.network.transformer import Llama, ModelConfig, first_weights, num_parameters
from model.training.engine import (
    EngineParams,
    build_model,
    draw_weights,
    evaluating,
    start_engine,
    token_loss,
    train_step,
)

CPU = torch.device("cpu")
CONTEXT, ROWS, HELD_OUT_ROWS, VOCABULARY = 256, 8, 16, 2048
PEAK, WARMUP, FINAL_RATIO = 2e-3, 10, 0.1
SIZES: dict[str, dict[str, int]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4},
    "15M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
}


def config_of(size: str) -> ModelConfig:
    """Return a model of one of the sizes."""
    heads = SIZES[size]["num_attention_heads"]
    return ModelConfig.model_validate(
        {
            **SIZES[size], "num_key_value_heads": heads, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False,
        }
    )  # fmt: skip


def draw_stream(num_rows: int, seed: int) -> tuple[Shards, Starts]:
    """Return rows of text, one document each: every token is followed by one of eight, most often the first."""
    successors = np.random.default_rng(0).integers(0, VOCABULARY, size=(VOCABULARY, 8))
    shares = 1 / np.arange(1, 9)
    rng = np.random.default_rng(seed)
    choices = rng.choice(8, size=(num_rows, CONTEXT), p=shares / shares.sum())
    rows = np.empty((num_rows, CONTEXT), dtype=np.int64)
    rows[:, 0] = rng.integers(0, VOCABULARY, size=num_rows)
    for position in range(1, CONTEXT):
        rows[:, position] = successors[rows[:, position - 1], choices[:, position]]
    return Shards([np.append(rows, 0)]), np.arange(0, num_rows * CONTEXT + 1, CONTEXT)


def batch_of(stream: tuple[Shards, Starts], first_row: int, num_rows: int) -> Batch:
    """Return rows of a stream as the stage packs them."""
    return batch_of_rows(*stream, first_row, num_rows, CONTEXT, CPU)


def rows_of(stream: tuple[Shards, Starts]) -> torch.Tensor:
    """Return a stream as rows, the Trainer's examples."""
    tokens = stream[0].read(0, len(stream[0]) - 1)
    return torch.from_numpy(tokens.reshape(-1, CONTEXT))


def engine_params(precision: str, zero_stage: int) -> EngineParams:
    """Return the parameters of our training: Llama 2's optimiser."""
    return EngineParams.model_validate(
        {
            "zero_stage": zero_stage, "precision": precision, "offload": "none", "activation_checkpointing": "off",
            "batch_rows": ROWS, "micro_batch_rows": ROWS, "learning_rate": PEAK, "warmup_steps": WARMUP,
            "warmup_ratio": 0.0, "final_learning_rate_ratio": FINAL_RATIO, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-5,
            "weight_decay": 0.1, "gradient_clipping": 1.0,
        }
    )  # fmt: skip


def fresh_engine(size: str, precision: str, zero_stage: int, num_steps: int) -> Any:
    """Return a DeepSpeed engine; its initial weights are the same every time."""
    params = engine_params(precision, zero_stage)
    model = build_model(Llama, config_of(size), params)
    draw_weights(model, seed=1)
    return start_engine(model, params, num_steps)


def their_model(size: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model with our initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, generator = config_of(size), torch.Generator().manual_seed(1)
    weights = {
        name: first_weights(name, parameter.shape, config, generator)
        for name, parameter in Llama(config, "off").named_parameters()
    }
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa"))
    theirs.load_state_dict(weights)
    return theirs.to(dtype)


# --- training runs: each in its own process, because the Trainer uses any ranks that it finds ---


Curves = tuple[list[float], list[float]]  # seconds of each step, validation losses every few steps


@dataclass(frozen=True)
class Run:
    """A training run among others of the same number of steps."""

    size: str
    kind: str  # `here, ` or `Trainer, `, and the precision
    num_steps: int
    evaluate_every: int


def train(run: Run, clock: Clock) -> Curves:
    """Train a run, in its own process, with the code of its kind."""
    losses = (train_ours if run.kind.startswith("here") else train_theirs)(run, clock)
    return clock.seconds, losses


def join_alone() -> None:
    """Make this process the only rank of a training run."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    join_ranks()


def train_ours(run: Run, clock: Clock) -> list[float]:
    """Train as the stage does."""
    join_alone()
    engine = fresh_engine(run.size, run.kind.removeprefix("here, "), 0, run.num_steps)
    stream, held_out = draw_stream(run.num_steps * ROWS, seed=1), held_out_rows()
    losses = []
    for step in range(1, run.num_steps + 1):
        clock.begin()
        batch = batch_of(stream, (step - 1) * ROWS, ROWS)
        train_step(engine, [batch], token_loss, batch.num_targets, lambda loss, norm: True)
        if step % run.evaluate_every == 0:
            with clock.stopped(), evaluating(engine):
                batch = batch_of(held_out, 0, HELD_OUT_ROWS)
                total = engine(batch.ids, batch.documents, batch.targets).double().sum()
                losses.append(float(total) / batch.num_targets)
    clock.end()
    return losses


def train_theirs(run: Run, clock: Clock) -> list[float]:
    """Train with Hugging Face's Trainer, with the same optimiser and learning rates."""
    from torch.nn.functional import cross_entropy
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    autocast, compiled = "autocast" in run.kind, "compiled" in run.kind
    model = their_model(run.size, torch.bfloat16 if "bf16 weights" in run.kind else torch.float32)
    rows = rows_of(draw_stream(run.num_steps * ROWS, seed=1))
    held_out = rows_of(held_out_rows())
    predicted = batch_of(held_out_rows(), 0, HELD_OUT_ROWS).targets.view(HELD_OUT_ROWS, CONTEXT)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_ratio(step + 1, run.num_steps))
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % run.evaluate_every == 0:
                with clock.stopped(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(held_out).logits
                    losses.append(float(cross_entropy(logits.float().flatten(0, 1), predicted.flatten())))

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, use_cpu=True, per_device_train_batch_size=ROWS, max_steps=run.num_steps,
            max_grad_norm=1.0, bf16=autocast, torch_compile=compiled, train_sampling_strategy="sequential",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]  # the model shifts the labels itself
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples, callbacks=[Watch()], optimizers=(optimizer, schedule)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    clock.end()
    return losses


def held_out_rows() -> tuple[Shards, Starts]:
    """Return text that no run trains on."""
    return draw_stream(HELD_OUT_ROWS, seed=2)


def learning_rate_ratio(step: int, num_steps: int) -> float:
    """Return our engine's learning rate at a step, counted from 1, as a share of the peak."""
    if step < WARMUP:
        return step / WARMUP
    progress = min(1.0, (step - WARMUP + 1) / (num_steps + 1 - WARMUP))
    return FINAL_RATIO + (1 - FINAL_RATIO) * (1 + math.cos(math.pi * progress)) / 2


def steady(seconds: list[float]) -> float:
    """Return the median time of a step, without the first ones, which allocate and compile."""
    return statistics.median(seconds[3:])


# --- the parts ---


def compare_logits() -> None:
    """Print how much our logits differ from transformers'."""
    join_alone()
    print("| parameters | key/value heads | deviation of logits | greatest difference |\n| --- | --- | --- | --- |")
    for size, groups in itertools.product(SIZES, (1, 2)):
        config = config_of(size)
        config = config.model_copy(update={"num_key_value_heads": config.num_attention_heads // groups})
        deviation, difference = logits_of_both(config)
        print(f"| {num_parameters(config):,} | {config.num_key_value_heads} | {deviation:.2f} | {difference:.1e} |")


def logits_of_both(config: ModelConfig) -> tuple[float, float]:
    """Return the logits' standard deviation and maximum difference on four rows, with ten times the initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = Llama(config, "off")
    draw_weights(ours, seed=1)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa"))
    theirs.load_state_dict(ours.state_dict())
    stream = draw_stream(4, seed=3)
    with torch.no_grad():
        batch = batch_of(stream, 0, 4)
        expected = theirs(rows_of(stream)).logits.flatten(0, 1)
        return float(expected.std()), float((ours(batch.ids, batch.documents) - expected).abs().max())


def compare_speed() -> None:
    """Print tokens per second against the Trainer; our bf16 has float32 masters, as autocast does."""
    print("| parameters | here | Trainer | here, tokens/s | Trainer, tokens/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    pairs = (("fp32", "fp32"), ("bf16", "bf16 autocast"), ("bf16", "bf16 weights"))
    for size, (ours, theirs) in itertools.product(("5M", "15M"), pairs):
        kinds = (f"here, {ours}", f"Trainer, {theirs}")
        curves = train_in_turns(train, [Run(size, kind, 20, 100) for kind in kinds])
        here, there = (ROWS * CONTEXT / steady(seconds) for seconds, _ in curves)
        print(
            f"| {num_parameters(config_of(size)):,} | {ours} | {theirs} | {here:,.0f} | {there:,.0f} "
            f"| {here / there:.2f} |"
        )


def compare_time_to_loss() -> None:
    """Print seconds to the same validation loss: the number of steps times a steady step's seconds, not compilation."""
    print("| parameters | run | ms per step | final validation loss | seconds to the loss all reach | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    kinds = (
        "here, bf16",
        "Trainer, fp32",
        *(f"Trainer, bf16 {how}" for how in ("autocast", "weights", "autocast compiled")),
    )
    every = 5
    for size, steps in (("5M", 60), ("15M", 40)):
        curves = train_in_turns(train, [Run(size, kind, steps, every) for kind in kinds])
        results = dict(zip(kinds, curves, strict=True))
        reached = max(losses[-1] for _, losses in results.values())
        times = {
            name: steady(seconds) * steps_to(reached, losses, every) for name, (seconds, losses) in results.items()
        }
        for name, (seconds, losses) in results.items():
            print(
                f"| {num_parameters(config_of(size)):,} | {name} | {1000 * steady(seconds):.0f} | {losses[-1]:.3f} "
                f"| {times[name]:.1f} | {times[name] / times['here, bf16']:.2f} |"
            )


def steps_to(loss: float, losses: list[float], every: int) -> float:
    """Return the step at which a curve first reaches a loss, interpolated linearly between its points."""
    for number, value in enumerate(losses):
        if value <= loss:
            before = losses[number - 1] if number else value
            share = (before - loss) / (before - value) if before > value else 1.0
            return every * (number + share)
    raise AssertionError("every curve reaches the greatest of the final losses")


def measure_overhead() -> None:
    """Print DeepSpeed's share of a step: the extra time against a plain loop that does the same."""
    join_alone()
    print("| parameters | precision | ZeRO stage | plain, ms | DeepSpeed, ms | its share |")
    print("| --- | --- | --- | --- | --- | --- |")
    num_steps = 23
    for size, precision, zero_stage in itertools.product(("1M", "5M"), ("bf16", "fp32"), (0, 1)):
        engine, plain = fresh_engine(size, precision, zero_stage, num_steps), plain_loop(size, precision)
        seconds: dict[str, list[float]] = {"plain": [], "deepspeed": []}
        stream = draw_stream(num_steps * ROWS, seed=1)
        for step in range(num_steps):
            batch = batch_of(stream, step * ROWS, ROWS)
            started = time.perf_counter()
            plain(batch)
            between = time.perf_counter()
            train_step(engine, [batch], token_loss, ROWS * CONTEXT, lambda loss, norm: True)
            seconds["plain"].append(between - started)
            seconds["deepspeed"].append(time.perf_counter() - between)
        alone, together = steady(seconds["plain"]), steady(seconds["deepspeed"])
        print(
            f"| {num_parameters(config_of(size)):,} | {precision} | {zero_stage} | {1000 * alone:.1f} "
            f"| {1000 * together:.1f} | {100 * (1 - alone / together):.1f}% |"
        )


def plain_loop(size: str, precision: str) -> Callable[[Batch], float]:
    """Return a training step without DeepSpeed: float32 masters if weights are bf16, clipping, AdamW."""
    model = Llama(config_of(size), "off")
    draw_weights(model, seed=1)
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    if precision == "bf16":
        model.to(torch.bfloat16)
    groups = [
        {"params": [master for master in masters if master.dim() > 1], "weight_decay": 0.1},
        {"params": [master for master in masters if master.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step(batch: Batch) -> float:
        loss = model(batch.ids, batch.documents, batch.targets).sum() / (ROWS * CONTEXT)
        loss.backward()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
        return float(loss.detach())

    return step


PARTS: dict[str, Callable[[], None]] = {
    "parity": compare_logits,
    "speed": compare_speed,
    "loss": compare_time_to_loss,
    "overhead": measure_overhead,
}


if __name__ == "__main__":
    run_parts(PARTS, "transformers")
