"""Compare reward model training with TRL's RewardTrainer.

    pip install 'accelerate>=1.10' 'transformers>=5.0' 'trl>=1.16' datasets
    OMP_WAIT_POLICY=passive python -m benchmarks.reward [loss] [speed]

Everything runs on the CPU, with as many threads as processors. Both sides start from the same weights and take the same
steps, with the same optimiser and learning rates, on the same pairs with the same margins. Runs take their steps in
turns, so that other load on the machine affects them alike.

- loss: held-out ranking loss after the same steps in float32, both models measured by the same code.
- speed: pairs per second over the same pairs, in each precision.

We pack answers. TRL pads them to the longest of the micro batch, so it gains from pairs of similar length: with
`grouped` its pairs are sorted by length, which no random grouping can beat.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.pretrain import (
    CONTEXT,
    CPU,
    PEAK,
    VOCABULARY,
    config_of,
    draw_stream,
    engine_params,
    join_alone,
    learning_rate_ratio,
)
from benchmarks.turns import Clock, run_parts, train_in_turns
from model.network.transformer import first_weights, num_parameters
from model.network.weights import fill_weights
from model.scoring.pairs import MARGINS, Pair, batch_of_pairs, pair_losses
from model.scoring.reward import RewardModel
from model.training.engine import build_model, start_engine, train_step

PAIRS, NUM_HELD_OUT, NUM_WARM_UP = 8, 64, 2  # pairs of a step, pairs held out, steps that are not timed
BOS, EOS, PAD = 1, 2, 0


def draw_pairs(count: int, seed: int) -> list[Pair]:
    """Return pairs of answers of 10 to 80 tokens to prompts of 15 to 60, with all degrees of preference."""
    rng = np.random.default_rng(seed)
    text = draw_stream(2 * count, seed)[0]
    margins = list(MARGINS["small"].values())
    pairs = []
    for number in range(count):
        places = (0, rng.integers(15, 61)), (CONTEXT, rng.integers(10, 81)), (CONTEXT + 100, rng.integers(10, 81))
        starts = [(2 * number * CONTEXT + begin, int(length)) for begin, length in places]
        # ordinary tokens only: transformers doesn't train on what it takes for padding
        prompt, *answers = (np.maximum(text.read(start, start + length), 3).tolist() for start, length in starts)
        chosen, rejected = ([BOS, *prompt, *answer, EOS] for answer in answers)
        pairs.append(Pair(chosen, rejected, margins[number % len(margins)], None, None))
    return pairs


def pairs_of(num_steps: int, grouped: bool) -> list[Pair]:
    """Return the pairs of a run's steps; if grouped, the timed ones are sorted by length."""
    pairs = draw_pairs(num_steps * PAIRS, seed=1)
    warm_up, timed = pairs[: NUM_WARM_UP * PAIRS], pairs[NUM_WARM_UP * PAIRS :]
    return warm_up + (sorted(timed, key=lambda pair: max(len(pair.chosen), len(pair.rejected))) if grouped else timed)


@dataclass(frozen=True)
class Run:
    """A training run among others of the same number of steps."""

    size: str
    side: str  # here, padded or grouped
    dtype: str  # fp32; bf16 weights, here with float32 masters; or `bf16 autocast`
    pairs_at_once: int
    num_steps: int

    @property
    def name(self) -> str:
        """The run's name in a table."""
        return f"{self.side if self.side == 'here' else f'TRL {self.side}'}, {self.dtype}, {self.pairs_at_once} at once"


Outcome = tuple[list[float], float]  # seconds of each step, held-out loss at the end


def train(run: Run, clock: Clock) -> Outcome:
    """Train a run, in its own process, with the code of its side."""
    weights = (train_ours if run.side == "here" else train_theirs)(run, clock)
    return clock.seconds, held_out_loss(run.size, weights)


def held_out_loss(size: str, weights: dict[str, torch.Tensor]) -> float:
    """Return the ranking loss of pairs that no run trains on, in float32."""
    model = RewardModel(config_of(size), "off")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.no_grad():
        losses, _ = pair_losses(model, batch_of_pairs(draw_pairs(NUM_HELD_OUT, seed=2), CPU), 0.0)
    return float(losses.double().mean())


def train_ours(run: Run, clock: Clock) -> dict[str, torch.Tensor]:
    """Train as the stage does; return the weights."""
    join_alone()
    rows = {"batch_rows": 2 * PAIRS, "micro_batch_rows": 2 * run.pairs_at_once}
    params = engine_params(run.dtype, 0).model_copy(update=rows)
    config, generator = config_of(run.size), torch.Generator().manual_seed(1)
    model = build_model(RewardModel, config, params)
    fill_weights(model, lambda name, shape: first_weights(name, shape, config, generator))
    engine = start_engine(model, params, run.num_steps)
    pairs = pairs_of(run.num_steps, grouped=False)
    for step in range(run.num_steps):
        clock.begin()
        firsts = range(step * PAIRS, (step + 1) * PAIRS, run.pairs_at_once)
        batches = [batch_of_pairs(pairs[first : first + run.pairs_at_once], CPU) for first in firsts]
        train_step(
            engine, batches, lambda own, batch: pair_losses(own, batch, 0.0)[0].sum(), PAIRS, lambda loss, norm: True
        )
    clock.end()
    weights: dict[str, torch.Tensor] = engine.module.state_dict()
    return weights


def their_model(size: str, dtype: torch.dtype) -> Any:
    """Return transformers' model with our initial weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config, generator = config_of(size), torch.Generator().manual_seed(1)
    weights = {
        name: first_weights(name, parameter.shape, config, generator)
        for name, parameter in RewardModel(config, "off").named_parameters()
    }
    theirs = LlamaForSequenceClassification(
        LlamaConfig(**config.model_dump(), num_labels=1, pad_token_id=PAD, attn_implementation="sdpa")
    )
    theirs.load_state_dict(weights)
    return theirs.to(dtype)


def train_theirs(run: Run, clock: Clock) -> dict[str, torch.Tensor]:
    """Train with TRL's RewardTrainer; return the weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    model = their_model(run.size, torch.bfloat16 if run.dtype == "bf16" else torch.float32)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_ratio(step + 1, run.num_steps))
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}  # unused, but the trainer needs a tokenizer
    ends = {"eos_token": f"w{EOS}", "pad_token": f"w{PAD}"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0")), **ends)
    pairs = pairs_of(run.num_steps, run.side == "grouped")
    columns = {"chosen_ids": "chosen", "rejected_ids": "rejected", "margin": "margin"}
    dataset = Dataset.from_dict({name: [getattr(pair, its) for pair in pairs] for name, its in columns.items()})

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            output_dir=directory, use_cpu=True, max_length=CONTEXT, per_device_train_batch_size=run.pairs_at_once,
            gradient_accumulation_steps=PAIRS // run.pairs_at_once, max_steps=run.num_steps, max_grad_norm=1.0,
            bf16="autocast" in run.dtype, gradient_checkpointing=False, train_sampling_strategy="sequential",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()],
            optimizers=(optimizer, schedule),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    clock.end()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


# --- the parts ---


def compare_losses() -> None:
    """Print both sides' held-out loss after the same steps in float32."""
    print("| parameters | steps | here | TRL | difference |\n| --- | --- | --- | --- | --- |")
    num_steps = 20
    for size in ("1M", "5M"):
        runs = [Run(size, side, "fp32", PAIRS, num_steps) for side in ("here", "padded")]
        (_, here), (_, there) = train_in_turns(train, runs)
        parameters = num_parameters(config_of(size))
        print(f"| {parameters:,} | {num_steps} | {here:.5f} | {there:.5f} | {abs(here - there):.1e} |", flush=True)


def compare_speed() -> None:
    """Print pairs per second over the same pairs; the ratio is how much faster we are."""
    print("| parameters | run | ms per step | pairs/s | ratio |\n| --- | --- | --- | --- | --- |")
    num_steps = NUM_WARM_UP + 10
    for size, dtype in itertools.product(("1M", "5M", "15M"), ("fp32", "bf16")):
        run = partial(Run, size, num_steps=num_steps)
        sides = itertools.product(("padded", "grouped"), (2, PAIRS))
        runs = [run("here", dtype, PAIRS), *(run(side, dtype, pairs_at_once) for side, pairs_at_once in sides)]
        if dtype == "bf16":
            runs.append(run("grouped", "bf16 autocast", PAIRS))
        speeds = []
        for this, (times, _) in zip(runs, train_in_turns(train, runs), strict=True):
            seconds = sum(times[NUM_WARM_UP:]) / (num_steps - NUM_WARM_UP)
            speeds.append(PAIRS / seconds)
            ratio = "" if this.side == "here" else f"{speeds[0] / speeds[-1]:.2f}"
            parameters = num_parameters(config_of(size))
            print(f"| {parameters:,} | {this.name} | {1000 * seconds:.0f} | {speeds[-1]:.1f} | {ratio} |", flush=True)


PARTS: dict[str, Callable[[], None]] = {"loss": compare_losses, "speed": compare_speed}


if __name__ == "__main__":
    run_parts(PARTS, "trl")
