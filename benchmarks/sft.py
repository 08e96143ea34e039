"""Compare fine-tuning on demonstrations with TRL's SFTTrainer, with packing on.

    pip install 'accelerate>=1.10' 'transformers>=5.0' 'trl>=1.16' datasets
    OMP_WAIT_POLICY=passive python -m benchmarks.sft [loss] [speed]

Everything runs on the CPU, with as many threads as processors. Both sides start from the same weights and take the same
steps, with the same optimiser and learning rates, on the same rows: those that TRL packs. Runs take their steps in
turns, so that other load on the machine affects them alike.

- loss: held-out loss after the same steps in float32, both models measured by the same code.
- speed: supervised tokens (those that the loss is on) per second, in each precision.

TRL packs by best fit, with all dialogues of the micro batch after one another in a single row (`bfd`). Without a GPU it
uses torch's own attention, with a mask that keeps dialogues apart, over the whole micro batch at once. This is small or
large: one row, accumulated eight times, or eight rows. `wrapped` is its packing that cuts dialogues and lets them see
each other. That is not what we want; it is shown because it is TRL's fastest.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.pretrain import (
    CONTEXT,
    CPU,
    PEAK,
    ROWS,
    VOCABULARY,
    config_of,
    draw_stream,
    fresh_engine,
    join_alone,
    learning_rate_ratio,
    steady,
    their_model,
)
from benchmarks.turns import Clock, run_parts, train_in_turns
from model.network.packing import IGNORED, Example, batch_of_examples
from model.network.transformer import Llama, num_parameters
from model.training.engine import token_loss, train_step

NUM_DIALOGUES, NUM_HELD_OUT = 600, 60


def draw_dialogues(count: int, seed: int) -> list[Example]:
    """Return dialogues: prompts of 15 to 60 tokens, and answers of 10 to 80, of which only the answers are learnt."""
    rng = np.random.default_rng(seed)
    text = draw_stream(count, seed)[0]
    dialogues = []
    for number in range(count):
        prompt, answer = int(rng.integers(15, 61)), int(rng.integers(10, 81))
        ids = text.read(number * CONTEXT, number * CONTEXT + prompt + answer).astype(np.int32)
        dialogues.append(Example(ids, np.arange(prompt + answer) >= prompt))
    return dialogues


def their_dataset(dialogues: Sequence[Example]) -> Any:
    """Return dialogues as a dataset for TRL, already tokenized."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [dialogue.ids.tolist() for dialogue in dialogues],
            "labels": [np.where(dialogue.is_learnt, dialogue.ids, IGNORED).tolist() for dialogue in dialogues],
        }
    )


def packed_rows(strategy: str) -> list[list[Example]]:
    """Return the rows that TRL packs; those of `wrapped` hold one piece each, as TRL treats them."""
    from trl import pack_dataset

    rows = []
    for row in pack_dataset(their_dataset(draw_dialogues(NUM_DIALOGUES, seed=1)), CONTEXT, strategy):
        ids, is_learnt = np.array(row["input_ids"], dtype=np.int32), np.array(row["labels"]) != IGNORED
        ends = np.cumsum(row.get("seq_lengths") or [len(ids)])[:-1]
        rows.append([Example(*part) for part in zip(np.split(ids, ends), np.split(is_learnt, ends), strict=True)])
    return rows


def targets_a_step(strategy: str, num_steps: int) -> float:
    """Return the average number of tokens that a step's loss is on."""
    rows = packed_rows(strategy)[: num_steps * ROWS]
    return sum(example.num_targets for row in rows for example in row) / num_steps


@dataclass(frozen=True)
class Run:
    """A training run among others of the same number of steps."""

    size: str
    side: str  # here, bfd or wrapped
    dtype: str  # fp32; bf16 weights, here with float32 masters; or `bf16 autocast`
    micro_batch_rows: int
    num_steps: int

    @property
    def name(self) -> str:
        """The run's name in a table."""
        side = self.side if self.side == "here" else f"TRL {self.side}"
        return f"{side}, {self.dtype}, {self.micro_batch_rows} row{'s' * (self.micro_batch_rows > 1)} at once"


Outcome = tuple[list[float], float]  # seconds of each step, held-out loss at the end


def train(run: Run, clock: Clock) -> Outcome:
    """Train a run, in its own process, with the code of its side."""
    weights = (train_ours if run.side == "here" else train_theirs)(run, clock)
    return clock.seconds, held_out_loss(run.size, weights)


def held_out_loss(size: str, weights: dict[str, torch.Tensor]) -> float:
    """Return the loss of dialogues that no run trains on, in float32."""
    model = Llama(config_of(size), "off")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    batch = batch_of_examples(draw_dialogues(NUM_HELD_OUT, seed=2), CPU)
    with torch.no_grad():
        return float(model(batch.ids, batch.documents, batch.targets).double().sum()) / batch.num_targets


def train_ours(run: Run, clock: Clock) -> dict[str, torch.Tensor]:
    """Train as the stage does; return the weights."""
    join_alone()
    engine = fresh_engine(run.size, run.dtype, 0, run.num_steps)
    rows = packed_rows("bfd")
    for step in range(run.num_steps):
        clock.begin()
        own = [example for row in rows[step * ROWS : (step + 1) * ROWS] for example in row]
        num_targets = sum(example.num_targets for example in own)
        train_step(engine, [batch_of_examples(own, CPU)], token_loss, num_targets, lambda loss, norm: True)
    clock.end()
    weights: dict[str, torch.Tensor] = engine.module.state_dict()
    return weights


def train_theirs(run: Run, clock: Clock) -> dict[str, torch.Tensor]:
    """Train with TRL's SFTTrainer; return the weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = their_model(run.size, torch.bfloat16 if run.dtype == "bf16" else torch.float32)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_ratio(step + 1, run.num_steps))
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}  # unused, but the trainer needs a tokenizer
    ends = {"eos_token": "w2", "pad_token": "w1"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0")), **ends)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory, use_cpu=True, packing=True, packing_strategy=run.side, max_length=CONTEXT,
            per_device_train_batch_size=run.micro_batch_rows, gradient_accumulation_steps=ROWS // run.micro_batch_rows,
            max_steps=run.num_steps, max_grad_norm=1.0, bf16="autocast" in run.dtype, gradient_checkpointing=False,
            train_sampling_strategy="sequential", logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=their_dataset(draw_dialogues(NUM_DIALOGUES, seed=1)),
            processing_class=tokenizer, callbacks=[Watch()], optimizers=(optimizer, schedule),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    clock.end()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


# --- the parts ---


def compare_losses() -> None:
    """Print both sides' held-out loss after the same steps in float32."""
    print("| parameters | steps | here | TRL bfd | difference |\n| --- | --- | --- | --- | --- |")
    num_steps = 20
    for size in ("1M", "5M"):
        runs = [Run(size, side, "fp32", ROWS, num_steps) for side in ("here", "bfd")]
        (_, here), (_, there) = train_in_turns(train, runs)
        print(
            f"| {num_parameters(config_of(size)):,} | {num_steps} | {here:.5f} | {there:.5f} "
            f"| {abs(here - there):.1e} |"
        )


def compare_speed() -> None:
    """Print supervised tokens per second; the ratio is how much faster we are."""
    print("| parameters | run | ms per step | supervised tokens/s | ratio |\n| --- | --- | --- | --- | --- |")
    num_steps = 12
    targets = {side: targets_a_step(strategy, num_steps) for side, strategy in STRATEGIES.items()}
    for size, dtype in itertools.product(("1M", "5M", "15M"), ("fp32", "bf16")):
        run = partial(Run, size, num_steps=num_steps)
        runs = [run("here", dtype, ROWS), *(run("bfd", dtype, rows) for rows in (1, ROWS))]
        if dtype == "bf16":
            runs += [run("bfd", "bf16 autocast", 1), run("wrapped", dtype, ROWS)]
        seconds = [steady(times) for times, _ in train_in_turns(train, runs)]
        speeds = [targets[run.side] / second for run, second in zip(runs, seconds, strict=True)]
        for this, second, speed in zip(runs, seconds, speeds, strict=True):
            ratio = "" if this.side == "here" else f"{speeds[0] / speed:.2f}"
            parameters = num_parameters(config_of(size))
            print(f"| {parameters:,} | {this.name} | {1000 * second:.0f} | {speed:,.0f} | {ratio} |", flush=True)


STRATEGIES = {"here": "bfd", "bfd": "bfd", "wrapped": "wrapped"}  # the packing that each side trains on
PARTS: dict[str, Callable[[], None]] = {"loss": compare_losses, "speed": compare_speed}


if __name__ == "__main__":
    run_parts(PARTS, "trl")
