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
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
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


# --- one training run of each kind, in a process of its own: the Trainer takes any ranks it sees for its own ---


def join_alone() -> None:
    """Make this process the only rank of a training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    join_ranks()


def processes() -> tuple[Executor, Executor]:
    """Return a process for our runs and one for the Trainer's."""
    fresh = get_context("spawn")
    return ProcessPoolExecutor(1, fresh, initializer=join_alone), ProcessPoolExecutor(1, fresh)


def train_ours(size: str, precision: str, num_steps: int, evaluate_every: int) -> tuple[list[float], list[float]]:
    """Return seconds of each step, and the validation losses after every `evaluate_every` of them."""
    engine = fresh_engine(size, precision, 1, num_steps)
    rows, held_out = draw_rows(num_steps * ROWS, seed=1), batch_of(draw_rows(16, seed=2))
    seconds, losses = [], []
    for step in range(num_steps):
        started = time.perf_counter()
        batch = batch_of(rows[step * ROWS : (step + 1) * ROWS])
        train_step(engine, [batch], ROWS * CONTEXT, lambda loss, norm: True)
        seconds.append(time.perf_counter() - started)
        if (step + 1) % evaluate_every == 0:
            with evaluating(engine):
                losses.append(float(engine(held_out.ids, held_out.documents, held_out.targets).double().mean()))
    return seconds, losses


def train_theirs(size: str, kind: str, num_steps: int, evaluate_every: int) -> tuple[list[float], list[float]]:
    """Return the same of Hugging Face's Trainer; kind: fp32, bf16 autocast, bf16 weights, the first two `compiled`."""
    from torch.nn.functional import cross_entropy
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = their_model(size, torch.bfloat16 if kind == "bf16 weights" else torch.float32)
    rows, held_out = draw_rows(num_steps * ROWS, seed=1), draw_rows(16, seed=2)
    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds.append(time.perf_counter() - self.started)
            if state.global_step % evaluate_every == 0:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
                    logits = model(held_out[:, :-1]).logits
                losses.append(float(cross_entropy(logits.float().flatten(0, 1), held_out[:, 1:].reshape(-1))))

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, use_cpu=True, per_device_train_batch_size=ROWS, max_steps=num_steps,
            learning_rate=PEAK, warmup_steps=WARMUP, lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": FINAL_RATIO}, optim="adamw_torch_fused", adam_beta1=0.9,
            adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.1, max_grad_norm=1.0, bf16="autocast" in kind,
            torch_compile=kind.endswith("compiled"), train_sampling_strategy="sequential", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        # The model shifts labels by itself: it gets the row's last token as an input too, and has no target for it.
        examples = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds, losses


def steady(seconds: list[float]) -> float:
    """Return the time of a step, once the first ones, which allocate, are over."""
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
    """Print tokens a second against the Trainer in the same precision."""
    print("| parameters | precision | here, tokens/s | Trainer, tokens/s | ratio |\n| --- | --- | --- | --- | --- |")
    here, there = processes()
    for size, (ours, theirs) in itertools.product(("5M", "15M"), (("fp32", "fp32"), ("bf16", "bf16 weights"))):
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(2):
            seconds["ours"].append(steady(here.submit(train_ours, size, ours, 14, 100).result()[0]))
            seconds["theirs"].append(steady(there.submit(train_theirs, size, theirs, 14, 100).result()[0]))
        best = {name: ROWS * CONTEXT / min(values) for name, values in seconds.items()}
        precision = ours if ours == theirs else f"{ours}, masters only here"
        print(
            f"| {num_parameters(config_of(size)):,} | {precision} | {best['ours']:,.0f} | {best['theirs']:,.0f} "
            f"| {best['ours'] / best['theirs']:.2f} |"
        )


def compare_time_to_loss() -> None:
    """Print seconds to the same validation loss: steps taken times a steady step's seconds, compiling left out."""
    print("| parameters | run | a step, ms | final validation loss | seconds to the loss all reach | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    every = 5
    here, there = processes()
    for size, steps in (("5M", 60), ("15M", 40)):
        results = {"here, bf16": here.submit(train_ours, size, "bf16", steps, every).result()}
        for kind in ("fp32", "bf16 autocast", "bf16 weights", "bf16 autocast compiled"):
            results[f"Trainer, {kind}"] = there.submit(train_theirs, size, kind, steps, every).result()
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
