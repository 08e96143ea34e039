"""Pretraining against Hugging Face's Trainer, and what DeepSpeed adds to a step.

    pip install 'accelerate>=1.10' 'transformers>=5.0'
    OMP_WAIT_POLICY=passive python -m benchmarks.pretrain [parity] [speed] [loss] [overhead]

All on the CPU, on as many threads as there are processors. Each part runs alone in a few minutes, prints a table, and
times its candidates in turns, step by step where it can, so that what else the machine does meets them alike.

- parity: greatest difference of the logits from transformers' LlamaForCausalLM, same weights and ids.
- speed: tokens a second against the Trainer in the same precision: same weights, ids, batch, optimiser, threads.
- loss: seconds to the same validation loss, each at the settings that reach it soonest: bf16 weights with float32
  masters here; for the Trainer the best of float32, bf16 autocast and bf16 weights.
- overhead: DeepSpeed's step against a plain loop that does the same.

The text is drawn from a bigram model with known entropy, rows of one document each, as the Trainer packs them.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from model.engine import EngineParams, build_model, draw_weights, evaluating, join_ranks, start_engine, train_step
from model.packing import Batch, documents_of
from model.transformer import Llama, ModelConfig, first_weights, num_parameters

CPU = torch.device("cpu")
CONTEXT, ROWS, VOCABULARY = 256, 8, 2048
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


def draw_rows(num_rows: int, seed: int) -> torch.Tensor:
    """Return rows of CONTEXT + 1 ids: each token is followed by one of eight, the first of them most often."""
    successors = np.random.default_rng(0).integers(0, VOCABULARY, size=(VOCABULARY, 8))
    shares = 1 / np.arange(1, 9)
    rng = np.random.default_rng(seed)
    choices = rng.choice(8, size=(num_rows, CONTEXT + 1), p=shares / shares.sum())
    rows = np.empty((num_rows, CONTEXT + 1), dtype=np.int64)
    rows[:, 0] = rng.integers(0, VOCABULARY, size=num_rows)
    for position in range(CONTEXT):
        rows[:, position + 1] = successors[rows[:, position], choices[:, position]]
    return torch.from_numpy(rows)


def batch_of(rows: torch.Tensor) -> Batch:
    """Return rows as a packed batch, each row one document."""
    lengths = [CONTEXT] * len(rows)
    return Batch(rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1), documents_of(lengths, CPU))


def engine_params(precision: str, zero_stage: int) -> EngineParams:
    """Return how the models here are trained: Llama 2's optimiser."""
    return EngineParams.model_validate(
        {
            "zero_stage": zero_stage, "precision": precision, "offload": "none", "activation_checkpointing": "off",
            "batch_rows": ROWS, "micro_batch_rows": ROWS, "learning_rate": PEAK, "warmup_steps": WARMUP,
            "final_learning_rate_ratio": FINAL_RATIO, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-5,
            "weight_decay": 0.1, "gradient_clipping": 1.0,
        }
    )  # fmt: skip


def fresh_engine(size: str, precision: str, zero_stage: int, num_steps: int) -> Any:
    """Return a DeepSpeed engine; its first weights are the same every time."""
    params = engine_params(precision, zero_stage)
    model = build_model(config_of(size), params)
    draw_weights(model, seed=1)
    return start_engine(model, params, num_steps)


def their_model(size: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model with our first weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, generator = config_of(size), torch.Generator().manual_seed(1)
    weights = {
        name: first_weights(name, parameter.shape, config, generator)
        for name, parameter in Llama(config, "off").named_parameters()
    }
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa"))
    theirs.load_state_dict(weights)
    return theirs.to(dtype)


# --- training runs: each in a process of its own, for the Trainer takes any ranks it sees for its own ---


Curves = tuple[list[float], list[float]]  # seconds of each step, validation losses every so many of them


@dataclass(frozen=True)
class Run:
    """A training run among others of the same number of steps."""

    size: str
    kind: str  # `here, ` or `Trainer, `, and the precision
    num_steps: int
    evaluate_every: int


class Turns:
    """Lets processes take their steps one after another, so that all meet the same noise of the machine."""

    def __init__(self, count: int) -> None:
        fresh = get_context("spawn")
        self.count, self.changed, self.whose = count, fresh.Condition(), fresh.Value("i", 0)

    def take(self, number: int) -> None:
        """Wait for our turn."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.whose.value == number, timeout=600), "another run has stopped"

    def give(self, number: int) -> None:
        """Let the next one go on."""
        with self.changed:
            self.whose.value = (number + 1) % self.count
            self.changed.notify_all()


def train_in_turns(runs: Sequence[Run]) -> dict[str, Curves]:
    """Train all side by side, step by step; return their curves by their kinds."""
    fresh, turns = get_context("spawn"), Turns(len(runs))
    results = fresh.SimpleQueue()
    workers = [fresh.Process(target=train, args=(run, turns, number, results)) for number, run in enumerate(runs)]
    for worker in workers:
        worker.start()
    curves = dict(results.get() for _ in runs)
    for worker in workers:
        worker.join()
    return {run.kind: curves[run.kind] for run in runs}


def train(run: Run, turns: Turns, number: int, results: Any) -> None:
    """Train, in a process of its own, and hand back kind and curves."""
    own = train_ours if run.kind.startswith("here") else train_theirs
    results.put((run.kind, own(run, partial(turns.take, number), partial(turns.give, number))))


def join_alone() -> None:
    """Make this process the only rank of a training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    join_ranks()


def train_ours(run: Run, take: Callable[[], None], give: Callable[[], None]) -> Curves:
    """Train as the stage does."""
    join_alone()
    engine = fresh_engine(run.size, run.kind.removeprefix("here, "), 1, run.num_steps)
    rows, held_out = draw_rows(run.num_steps * ROWS, seed=1), batch_of(draw_rows(16, seed=2))
    seconds, losses = [], []
    for step in range(1, run.num_steps + 1):
        take()
        started = time.perf_counter()
        batch = batch_of(rows[(step - 1) * ROWS : step * ROWS])
        train_step(engine, [batch], ROWS * CONTEXT, lambda loss, norm: True)
        seconds.append(time.perf_counter() - started)
        if step % run.evaluate_every == 0:
            with evaluating(engine):
                losses.append(float(engine(held_out.ids, held_out.documents, held_out.targets).double().mean()))
        give()
    return seconds, losses


def train_theirs(run: Run, take: Callable[[], None], give: Callable[[], None]) -> Curves:
    """Train by Hugging Face's Trainer, with the same optimiser and learning rates."""
    from torch.nn.functional import cross_entropy
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    autocast, compiled = "autocast" in run.kind, "compiled" in run.kind
    model = their_model(run.size, torch.bfloat16 if "bf16 weights" in run.kind else torch.float32)
    rows, held_out = draw_rows(run.num_steps * ROWS, seed=1), draw_rows(16, seed=2)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_ratio(step + 1, run.num_steps))
    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            take()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds.append(time.perf_counter() - self.started)
            if state.global_step % run.evaluate_every == 0:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(held_out[:, :-1]).logits
                losses.append(float(cross_entropy(logits.float().flatten(0, 1), held_out[:, 1:].reshape(-1))))
            give()

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, use_cpu=True, per_device_train_batch_size=ROWS, max_steps=run.num_steps,
            max_grad_norm=1.0, bf16=autocast, torch_compile=compiled, train_sampling_strategy="sequential",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        # The model shifts labels by itself: it gets the row's last token as an input too, and has no target for it.
        examples = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples, callbacks=[Watch()], optimizers=(optimizer, schedule)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds, losses


def learning_rate_ratio(step: int, num_steps: int) -> float:
    """Return the share of the peak that our engine trains the step with, steps counted from 1."""
    if step < WARMUP:
        return step / WARMUP
    progress = min(1.0, (step - WARMUP + 1) / (num_steps + 1 - WARMUP))
    return FINAL_RATIO + (1 - FINAL_RATIO) * (1 + math.cos(math.pi * progress)) / 2


def steady(seconds: list[float]) -> float:
    """Return the time of a step, once the first ones, which allocate and compile, are over."""
    return statistics.median(seconds[3:])


# --- the parts ---


def compare_logits() -> None:
    """Print how far our logits are from transformers'."""
    join_alone()
    print("| parameters | key/value heads | deviation of logits | greatest difference |\n| --- | --- | --- | --- |")
    for size, groups in itertools.product(SIZES, (1, 2)):
        config = config_of(size)
        config = config.model_copy(update={"num_key_value_heads": config.num_attention_heads // groups})
        deviation, difference = logits_of_both(config)
        print(f"| {num_parameters(config):,} | {config.num_key_value_heads} | {deviation:.2f} | {difference:.1e} |")


def logits_of_both(config: ModelConfig) -> tuple[float, float]:
    """Return the logits' deviation and greatest difference on four rows, with weights ten times the first ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = Llama(config, "off")
    draw_weights(ours, seed=1)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa"))
    theirs.load_state_dict(ours.state_dict())
    rows = draw_rows(4, seed=3)
    with torch.no_grad():
        batch = batch_of(rows)
        expected = theirs(rows[:, :-1]).logits.flatten(0, 1)
        return float(expected.std()), float((ours(batch.ids, batch.documents) - expected).abs().max())


def compare_speed() -> None:
    """Print tokens a second against the Trainer; our bf16 has float32 masters, as autocast has."""
    print("| parameters | here | Trainer | here, tokens/s | Trainer, tokens/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    pairs = (("fp32", "fp32"), ("bf16", "bf16 autocast"), ("bf16", "bf16 weights"))
    for size, (ours, theirs) in itertools.product(("5M", "15M"), pairs):
        kinds = (f"here, {ours}", f"Trainer, {theirs}")
        curves = train_in_turns([Run(size, kind, 20, 100) for kind in kinds])
        here, there = (ROWS * CONTEXT / steady(curves[kind][0]) for kind in kinds)
        print(
            f"| {num_parameters(config_of(size)):,} | {ours} | {theirs} | {here:,.0f} | {there:,.0f} "
            f"| {here / there:.2f} |"
        )


def compare_time_to_loss() -> None:
    """Print seconds to the same validation loss: steps taken times a steady step's seconds, compiling left out."""
    print("| parameters | run | a step, ms | final validation loss | seconds to the loss all reach | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    kinds = (
        "here, bf16",
        "Trainer, fp32",
        *(f"Trainer, bf16 {how}" for how in ("autocast", "weights", "autocast compiled")),
    )
    every = 5
    for size, steps in (("5M", 60), ("15M", 40)):
        results = train_in_turns([Run(size, kind, steps, every) for kind in kinds])
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
    """Return the step at which a curve first reaches a loss, between its points by a straight line."""
    for number, value in enumerate(losses):
        if value <= loss:
            before = losses[number - 1] if number else value
            share = (before - loss) / (before - value) if before > value else 1.0
            return every * (number + share)
    raise AssertionError("every curve reaches the greatest of the final losses")


def measure_overhead() -> None:
    """Print DeepSpeed's share of a step: what it takes longer than a plain loop that does the same."""
    join_alone()
    print("| parameters | precision | ZeRO stage | plain, ms | DeepSpeed, ms | its share |")
    print("| --- | --- | --- | --- | --- | --- |")
    num_steps = 23
    for size, precision, zero_stage in itertools.product(("1M", "5M"), ("bf16", "fp32"), (0, 1)):
        engine, plain = fresh_engine(size, precision, zero_stage, num_steps), plain_loop(size, precision)
        seconds: dict[str, list[float]] = {"plain": [], "deepspeed": []}
        for step in range(num_steps):
            batch = batch_of(draw_rows(ROWS, seed=step))
            started = time.perf_counter()
            plain(batch)
            between = time.perf_counter()
            train_step(engine, [batch], ROWS * CONTEXT, lambda loss, norm: True)
            seconds["plain"].append(between - started)
            seconds["deepspeed"].append(time.perf_counter() - between)
        alone, together = steady(seconds["plain"]), steady(seconds["deepspeed"])
        print(
            f"| {num_parameters(config_of(size)):,} | {precision} | {zero_stage} | {1000 * alone:.1f} "
            f"| {1000 * together:.1f} | {100 * (1 - alone / together):.1f}% |"
        )


def plain_loop(size: str, precision: str) -> Callable[[Batch], float]:
    """Return a training step without DeepSpeed: float32 masters where weights are bf16, clipping, AdamW."""
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


def main() -> None:
    """Run the parts named on the command line, or all."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in sys.argv[1:] or PARTS:
        print(f"\n### {name}\n")
        PARTS[name]()


if __name__ == "__main__":
    main()
