"""Teach the base model to answer, with demonstrations (Llama 2, section 3.1).

Dialogues that end with an answer are packed whole into rows of the context length, none attending to another, and the
loss is on the tokens of the answers alone. Each epoch draws a new order and packs again, so each dialogue is used once
per epoch. AdamW, linear warm-up, then a cosine. A run that was stopped, even killed, resumes from its last saved state
and reaches exactly the weights of an uninterrupted run.

A dialogue longer than the context is left out and listed, because cutting it would teach answers that break off. One
that asks what the evaluation asks is left out too, because the evaluation would then measure memorisation.

An intermediate checkpoint is kept: the first preferences need an earlier variant of the model (section 3.2.1).

Reads a Hugging Face Llama directory with its tokenizer (`init_from`), dialogues below `root`, and the evaluation's
prompts, to leave out dialogues that ask the same.
Writes a Hugging Face Llama directory with training.json, plots/train.csv, plots/validation.csv, samples.jsonl (the
answers to fixed held-out prompts at the end), too_long.jsonl and refused.jsonl (what was left out, and why); in early/
the earlier variant, a directory of the same kind.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from model.network.checkpoint import load_weights, save_model
from model.network.packing import IGNORED, Batch, Example, batch_of_examples, fill_rows
from model.network.ranks import join_ranks
from model.network.transformer import Llama, flops_per_token, num_parameters
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import (
    EngineParams,
    build_model,
    evaluating,
    gathered,
    num_micro_batches,
    start_engine,
    token_loss,
    train_step,
)
from tasks.learning.loop import Progress, Taken, digest_of, read_base, resume, run_steps, write_curves
from tasks.reading.contamination import REASON, answers_the_same, read_evaluation
from tasks.reading.dialogues import Dialogue, DialogueSource, read_dialogues, split_dialogues
from tasks.reading.prompts import as_text
from tasks.running.files import write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.stage import Stage, start

EARLY = "early"


class Params(EngineParams, Section):
    """The demonstrations, how they are learnt, and what is watched on the way."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory to start from, with its tokenizer")
    root: str = Field(min_length=1, description="directory of the dialogues; DVC watches it")
    sources: dict[str, DialogueSource] = Field(min_length=1, description="what is read below the root")
    max_malformed_share: float = Field(ge=0, lt=1, description="maximum share of malformed dialogues in a source")
    context: int = Field(gt=1, description="tokens of one row; longer dialogues are left out")
    epochs: int = Field(gt=0, description="uses of each dialogue")
    early_share: float = Field(gt=0, lt=1, description="share of the steps after which early/ is saved")
    log_every: int = Field(gt=0, description="steps between two logged points")
    validate_every: int = Field(gt=0, description="steps between two validations, each with its samples")
    samples_per_category: int = Field(ge=0, description="held-out prompts of each category that are answered each time")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of such an answer")
    save_every: int = Field(gt=0, description="steps between two saved states, from which a stopped run resumes")
    max_shard_bytes: int = Field(gt=0, description="maximum bytes of weights in one file of the checkpoint")


@dataclass(frozen=True)
class Data:
    """The dialogues as tokens, and what was left out."""

    train: list[Example]
    origins: list[str]  # source and id of each
    validation: dict[str, list[Example]]  # by category
    prompts: list[Dialogue]  # held-out dialogues whose prompts are answered at each validation
    too_long: list[dict[str, Any]]
    refused: list[Mapping[str, Any]]
    num_in_evaluation: int  # refused because they ask what the evaluation asks


@dataclass(frozen=True)
class Training:
    """One run: what is trained, on what data, and its progress."""

    stage: Stage[Params]
    engine: Any
    tokenizer: Tokenizer
    data: Data
    steps: list[list[list[int]]]  # the rows of each step; a row is indices into data.train
    progress: Progress


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train, validate, sample, save."""
    params, base = stage.params, Path(stage.params.init_from)
    join_ranks()
    config, tokenizer = read_base(base, params.context, "sft")
    data = read_data(params, tokenizer, stage.seed)
    steps = plan_steps(data.train, params, stage.seed)
    model = build_model(Llama, config, params)
    load_weights(model, base)
    engine = start_engine(model, params, len(steps))
    engines = {"model": engine}
    progress = resume(stage, engines, Progress({"tokens": 0, "answer_tokens": 0}, {"samples": []}))
    training = Training(stage, engine, tokenizer, data, steps, progress)
    run_steps(
        stage,
        engines,
        progress,
        len(steps),
        partial(take_step, training),
        validate=partial(evaluate, training),
        after={math.ceil(params.early_share * len(steps)): partial(save_early, training)},
        flops_per_token=flops_per_token(config, mean_context(data.train)),
    )
    save_model(model, tokenizer, stage.output, written(training), params.max_shard_bytes)
    if stage.rank == 0:
        shutil.copytree(stage.scratch / EARLY, stage.output / EARLY)  # not moved: the run may still be killed
    return report(training, num_parameters(config))


# --- what it starts from ---


def read_data(params: Params, tokenizer: Tokenizer, seed: int) -> Data:
    """Read the dialogues, hold some out, and encode them.

    Raises ValueError when none is left to train or to validate on, and as `read_evaluation` does.
    """
    dialogues, refused = read_dialogues(Path(params.root), params.sources, "sft", params.max_malformed_share)
    evaluation = read_evaluation()
    sound: list[Dialogue] = []
    asked: list[Dialogue] = []
    for dialogue in dialogues:
        (asked if answers_the_same(dialogue["messages"], evaluation) else sound).append(dialogue)
    train, held_out = split_dialogues(sound, params.sources, seed)
    examples, too_long = encode(train, tokenizer, params.context)
    validation, too_long_held_out = encode(held_out, tokenizer, params.context)
    for use, found, drawn in (("train", examples, train), ("validate", validation, held_out)):
        if not found:
            raise ValueError(
                f"no dialogue is left to {use} on: of {len(sound)} in `sft.sources` {len(drawn)} are to {use} on, "
                f"all longer than `sft.context` {params.context}: change `files`, `validation_share` or `context`"
            )
    by_category: dict[str, list[tuple[Dialogue, Example]]] = {}
    for dialogue, example in validation:
        by_category.setdefault(dialogue["category"], []).append((dialogue, example))
    by_category = dict(sorted(by_category.items()))
    return Data(
        train=[example for _, example in examples],
        origins=[f"{dialogue['source']} {dialogue['id']}" for dialogue, _ in examples],
        validation={name: [example for _, example in own] for name, own in by_category.items()},
        prompts=[dialogue for own in by_category.values() for dialogue, _ in own[: params.samples_per_category]],
        too_long=too_long + too_long_held_out,
        refused=[*refused, *({**dialogue, "error": REASON} for dialogue in asked)],
        num_in_evaluation=len(asked),
    )


def encode(
    dialogues: Iterable[Dialogue], tokenizer: Tokenizer, context: int
) -> tuple[list[tuple[Dialogue, Example]], list[dict[str, Any]]]:
    """Return the dialogues that fit into the context, with their tokens, and the names of those that don't."""
    fitting, too_long = [], []
    for dialogue in dialogues:
        ids, is_answer = encode_dialogue(dialogue["messages"], tokenizer)
        if len(ids) > context:
            too_long.append({"source": dialogue["source"], "id": dialogue["id"], "num_tokens": len(ids)})
        else:
            example = Example(np.asarray(ids, dtype=np.int32), np.asarray(is_answer, dtype=np.bool_))
            fitting.append((dialogue, example))
    return fitting, too_long


def plan_steps(examples: Sequence[Example], params: Params, seed: int) -> list[list[list[int]]]:
    """Return the rows of each step, as indices of examples.

    Each epoch draws an order of the examples, packs them, and draws an order of the rows. Epochs follow one another
    without a break; the last step may have fewer rows.
    """
    lengths = [len(example.ids) for example in examples]
    rows: list[list[int]] = []
    for epoch in range(params.epochs):
        rng = np.random.default_rng((seed, epoch))
        packed = fill_rows(lengths, rng.permutation(len(lengths)).tolist(), params.context)
        rows += [packed[number] for number in rng.permutation(len(packed))]
    return [rows[first : first + params.batch_rows] for first in range(0, len(rows), params.batch_rows)]


def mean_context(examples: Sequence[Example]) -> int:
    """Return the mean over tokens of the length of their dialogue, which determines the cost of attention."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.float64)
    return round(float((lengths**2).sum() / lengths.sum()))


# --- training ---


def take_step(training: Training) -> Taken:
    """Train on the next step's rows."""
    data, rows = training.data, training.steps[training.progress.step]
    numbers = [number for row in rows for number in row]
    num_answer_tokens = sum(data.train[number].num_targets for number in numbers)
    step = train_step(
        training.engine,
        micro_batches(training, rows),
        token_loss,
        num_answer_tokens,
        lambda loss, gradient_norm: math.isfinite(loss) and math.isfinite(gradient_norm),
    )
    return Taken(
        found={"loss": step.loss, "gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate},
        used={"tokens": sum(len(data.train[n].ids) for n in numbers), "answer_tokens": num_answer_tokens},
        sources=lambda: [data.origins[number] for number in numbers],
    )


def micro_batches(training: Training, rows: Sequence[Sequence[int]]) -> list[Batch]:
    """Return this rank's share of a step's rows.

    If rows run out, in the last step, a rank keeps in step with the others on a row that it doesn't learn from.
    """
    params, device = training.stage.params, training.engine.device
    num_micro = num_micro_batches(params, torch.distributed.get_world_size())
    first = torch.distributed.get_rank() * num_micro
    batches = []
    for number in range(first, first + num_micro):
        own = rows[number * params.micro_batch_rows : (number + 1) * params.micro_batch_rows]
        batch = batch_of_examples([training.data.train[n] for row in own or rows[:1] for n in row], device)
        batches.append(batch if own else replace(batch, targets=torch.full_like(batch.targets, IGNORED)))
    return batches


# --- validation ---


def evaluate(training: Training) -> None:
    """Log the mean loss of held-out answers, in nats per token, by category and overall; answer the prompts."""
    progress = training.progress
    sums = {name: loss_sum(training, examples) for name, examples in training.data.validation.items()}
    together = sum(total for total, _ in sums.values()), sum(count for _, count in sums.values())
    named = {"all": together, **{metric_name(name): own for name, own in sums.items()}}
    losses = {name: total / count for name, (total, count) in named.items()}
    at = {"step": progress.step, "tokens": progress.counts["tokens"]}
    progress.validation.append({**at, **losses})
    training.stage.log(validation_figures(losses), **at)
    answer_prompts(training)


def validation_figures(losses: Mapping[str, float]) -> dict[str, float]:
    """Return the losses by their metric names."""
    return {f"validation/{name}/loss": loss for name, loss in losses.items()}


def loss_sum(training: Training, examples: Sequence[Example]) -> tuple[float, float]:
    """Return the summed loss of answers, and its number of tokens; the ranks share the rows."""
    params, engine = training.stage.params, training.engine
    rows = fill_rows([len(example.ids) for example in examples], range(len(examples)), params.context)
    firsts = range(0, len(rows), params.micro_batch_rows)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    totals = torch.zeros(2, dtype=torch.float64)
    with evaluating(engine):
        for turn in range(rank, rank + len(firsts), world):
            first = firsts[min(turn, len(firsts) - 1)]
            own = [examples[number] for row in rows[first : first + params.micro_batch_rows] for number in row]
            batch = batch_of_examples(own, engine.device)
            loss = engine(batch.ids, batch.documents, batch.targets).double().sum()
            if turn < len(firsts):  # past the end, a rank only keeps in step with the others, which need its weights
                totals += torch.tensor([float(loss), batch.num_targets], dtype=torch.float64)
    totals = totals.to(engine.device)
    torch.distributed.all_reduce(totals)
    total, count = totals.tolist()
    return total, count


def answer_prompts(training: Training) -> None:
    """Answer the fixed prompts greedily, for the table of samples."""
    import pandas

    stage, data, progress = training.stage, training.data, training.progress
    if not data.prompts:
        return
    prompts = [dialogue["messages"][:-1] for dialogue in data.prompts]
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=stage.params.max_new_tokens)
    with gathered(training.engine) as model:
        responses = sample(
            model,
            [encode_prompt(messages, training.tokenizer) for messages in prompts],
            greedy,
            num_samples=1,
            eos_id=training.tokenizer.eos_id,
            seeds=[stage.seed] * len(prompts),
            max_rows=len(prompts),
            description=None,
        )
    for dialogue, messages, (response,) in zip(data.prompts, prompts, responses, strict=True):
        progress.notes["samples"].append(
            {
                "step": progress.step,
                "category": dialogue["category"],
                "prompt": as_text(messages),
                "answer": decode_answer(response.ids, training.tokenizer),
                "finished": response.finished,
            }
        )
    if stage.rank == 0:
        pandas.DataFrame(progress.notes["samples"]).to_csv(stage.tables / "samples.csv", index=False)


# --- the end ---


def written(training: Training) -> dict[str, Any]:
    """Return what training.json says about a checkpoint."""
    progress, base = training.progress, Path(training.stage.params.init_from)
    return {"step": progress.step, "tokens": progress.counts["tokens"], "base_sha256": digest_of(base)}


def save_early(training: Training) -> None:
    """Save the current model for the end, beside the states: a resumed run starts with an empty output."""
    stage, directory = training.stage, training.stage.scratch / EARLY
    if stage.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)  # left if a run was stopped between this and its next state
    save_model(training.engine.module, training.tokenizer, directory, written(training), stage.params.max_shard_bytes)


def report(training: Training, parameters: int) -> dict[str, float]:
    """Write the curves, the last answers, and what was left out; return the figures."""
    stage, data, progress = training.stage, training.data, training.progress
    train = [{name: value for name, value in row.items() if name != "answer_tokens"} for row in progress.train]
    write_curves(stage, train, progress.validation, part="category")
    last = [row for row in progress.notes["samples"] if row["step"] == progress.step]
    if stage.rank == 0:
        write_lines(stage.output / "samples.jsonl", last)
        write_lines(stage.output / "too_long.jsonl", data.too_long)
        write_lines(stage.output / "refused.jsonl", data.refused)
    losses = {name: loss for name, loss in progress.validation[-1].items() if name not in ("step", "tokens")}
    return {
        "parameters": parameters,
        "steps": progress.step,
        "dialogues": len(data.train),
        "dialogues_too_long": len(data.too_long),
        "dialogues_refused": len(data.refused),
        "dialogues_in_evaluation": data.num_in_evaluation,
        "tokens": progress.counts["tokens"],
        "answer_tokens": progress.counts["answer_tokens"],
        "train/loss": progress.train[-1]["loss"],
        **validation_figures(losses),
    }


if __name__ == "__main__":
    start(Params, run)
