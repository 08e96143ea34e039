"""Train a chat model on dialogues: the code of `sft`, of `fine_tuning` and of its controls (Llama 2, section 3.1).

Dialogues that end with an answer are packed whole into rows of the context length, none attending to another, and the
loss is on the tokens of the answers alone: of all answers of a dialogue, or of its last one, as its source says. Each
pass over the dialogues draws a new order and packs again. Of each source, as many dialogues are drawn as its weight
asks for; none comes again before all of its source have come. AdamW, linear warm-up, then a cosine. A run that was
stopped, even killed, resumes from its last saved state and reaches exactly the weights of an uninterrupted run.

A dialogue longer than the context is left out and listed, because cutting it would teach answers that break off. One
that asks what the evaluation asks is left out too, because the evaluation would then measure memorisation.

Reads a Hugging Face Llama directory with its tokenizer, dialogues, and the evaluation's prompts, to leave out dialogues
that ask the same.
Writes a Hugging Face Llama directory with training.json, plots/train.csv, plots/validation.csv, samples.jsonl (the
answers to fixed held-out prompts at the end), too_long.jsonl and refused.jsonl (what was left out, and why).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from tasks.running.digests import number_of
from tasks.running.files import write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.stage import Stage


class Params(EngineParams, Section):
    """The demonstrations, how they are learnt, and what is watched on the way."""

    root: str = Field(min_length=1, description="directory of the dialogues; DVC watches it")
    sources: dict[str, DialogueSource] = Field(min_length=1, description="what is read below the root")
    max_malformed_share: float = Field(ge=0, lt=1, description="maximum share of malformed dialogues in a source")
    context: int = Field(gt=1, description="tokens of one row; longer dialogues are left out")
    epochs: float = Field(gt=0, description="passes, each of as many dialogues as all sources that are learnt have")
    log_every: int = Field(gt=0, description="steps between two logged points")
    validate_every: int = Field(gt=0, description="steps between two validations, each with its samples")
    samples_per_category: int = Field(ge=0, description="held-out prompts of each category that are answered each time")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of such an answer")
    save_every: int = Field(gt=0, description="steps between two saved states, from which a stopped run resumes")
    max_shard_bytes: int = Field(gt=0, description="maximum bytes of weights in one file of the checkpoint")


class Folder(NamedTuple):
    """A directory of dialogues, and what is read in it; no two folders have a source of the same name."""

    root: Path
    sources: Mapping[str, DialogueSource]


class Pool(NamedTuple):
    """What is learnt from one source."""

    numbers: range  # its dialogues, as indices into Data.train
    weight: float


@dataclass(frozen=True)
class Data:
    """The dialogues as tokens, and what was left out."""

    train: list[Example]  # in the order of `pools`
    origins: list[str]  # source and id of each
    pools: dict[str, Pool]  # by source
    validation: dict[str, list[Example]]  # by category
    prompts: list[Dialogue]  # held-out dialogues whose prompts are answered at each validation
    too_long: list[dict[str, Any]]
    refused: list[Mapping[str, Any]]
    num_in_evaluation: int  # refused because they ask what the evaluation asks


@dataclass(frozen=True)
class Training:
    """One run: what is trained, on what data, and its progress."""

    stage: Stage[Any]  # its parameters are a `Params`
    base: Path
    engine: Any
    tokenizer: Tokenizer
    data: Data
    steps: list[list[list[int]]]  # the rows of each step; a row is indices into data.train
    progress: Progress


def train(
    stage: Stage[Any], base: Path, folders: Sequence[Folder], num_steps: int | None, notes: Mapping[str, Any]
) -> dict[str, float]:
    """Train, validate, sample, save; return the figures. `num_steps` is None where the epochs decide the length.

    `notes` are written into training.json.
    """
    training = prepare(stage, base, folders, num_steps)
    learn(training, {})
    return finish(training, notes)


def prepare(stage: Stage[Any], base: Path, folders: Sequence[Folder], num_steps: int | None) -> Training:
    """Read model and dialogues, and start the engine, or go on from where a stopped run left it."""
    params = stage.params
    join_ranks()
    config, tokenizer = read_base(base, params.context, stage.section)
    data = read_data(folders, params, tokenizer, stage.seed, stage.section)
    steps = plan_steps(data, params, stage.seed, num_steps)
    model = build_model(Llama, config, params)
    load_weights(model, base)
    engine = start_engine(model, params, len(steps))
    progress = resume(stage, {"model": engine}, Progress({"tokens": 0, "answer_tokens": 0}, {"samples": []}))
    return Training(stage, base, engine, tokenizer, data, steps, progress)


def learn(training: Training, after: Mapping[int, Callable[[], None]]) -> None:
    """Take the remaining steps; `after` maps step numbers to what is called after that step."""
    used = [training.data.train[number] for number in drawn_in(training.steps)]
    run_steps(
        training.stage,
        {"model": training.engine},
        training.progress,
        len(training.steps),
        partial(take_step, training),
        validate=partial(evaluate, training),
        validate_at=[last_epoch_begins(training)],
        after=after,
        flops_per_token=flops_per_token(training.engine.module.config, mean_context(used)),
    )


def finish(training: Training, notes: Mapping[str, Any]) -> dict[str, float]:
    """Save the model and what is to be told of its training; return the figures."""
    save(training, training.stage.output, notes)
    return report(training)


# --- what it learns from ---


def read_data(folders: Sequence[Folder], params: Params, tokenizer: Tokenizer, seed: int, section: str) -> Data:
    """Read the dialogues, hold some out, and encode them.

    Raises ValueError when none is left to train or to validate on, or none of a source that has a weight, and as
    `read_evaluation` does.
    """
    sources = {name: source for folder in folders for name, source in folder.sources.items()}
    evaluation = read_evaluation()
    sound: list[Dialogue] = []
    asked: list[Dialogue] = []
    refused: list[Mapping[str, Any]] = []
    for folder in folders:
        dialogues, malformed = read_dialogues(folder.root, folder.sources, section, params.max_malformed_share)
        refused += malformed
        for dialogue in dialogues:
            (asked if answers_the_same(dialogue["messages"], evaluation) else sound).append(dialogue)
    train, held_out = split_dialogues(sound, sources, seed)
    train = [dialogue for dialogue in train if sources[dialogue["source"]].weight > 0]
    examples, too_long = encode(train, sources, tokenizer, params.context)
    validation, too_long_held_out = encode(held_out, sources, tokenizer, params.context)
    for use, found, drawn in (("train", examples, train), ("validate", validation, held_out)):
        if not found:
            raise ValueError(
                f"no dialogue is left to {use} on: of {len(sound)} in `{section}.sources` {len(drawn)} are to {use} "
                f"on, all longer than `{section}.context` {params.context}: change `files`, `validation_share`, "
                "`weight` or `context`"
            )
    by_category: dict[str, list[tuple[Dialogue, Example]]] = {}
    for dialogue, example in validation:
        by_category.setdefault(dialogue["category"], []).append((dialogue, example))
    by_category = dict(sorted(by_category.items()))
    return Data(
        train=[example for _, example in examples],
        origins=[f"{dialogue['source']} {dialogue['id']}" for dialogue, _ in examples],
        pools=pools_of([dialogue for dialogue, _ in examples], sources, section),
        validation={name: [example for _, example in own] for name, own in by_category.items()},
        prompts=[dialogue for own in by_category.values() for dialogue, _ in own[: params.samples_per_category]],
        too_long=too_long + too_long_held_out,
        refused=[*refused, *({**dialogue, "error": REASON} for dialogue in asked)],
        num_in_evaluation=len(asked),
    )


def encode(
    dialogues: Iterable[Dialogue], sources: Mapping[str, DialogueSource], tokenizer: Tokenizer, context: int
) -> tuple[list[tuple[Dialogue, Example]], list[dict[str, Any]]]:
    """Return the dialogues that fit into the context, with their tokens, and the names of those that don't."""
    fitting, too_long = [], []
    for dialogue in dialogues:
        ids, is_learnt = encode_dialogue(dialogue["messages"], tokenizer, sources[dialogue["source"]].loss)
        if len(ids) > context:
            too_long.append({"source": dialogue["source"], "id": dialogue["id"], "num_tokens": len(ids)})
        else:
            example = Example(np.asarray(ids, dtype=np.int32), np.asarray(is_learnt, dtype=np.bool_))
            fitting.append((dialogue, example))
    return fitting, too_long


def pools_of(dialogues: Sequence[Dialogue], sources: Mapping[str, DialogueSource], section: str) -> dict[str, Pool]:
    """Return where each source's dialogues are among those to train on, which are in the sources' order.

    Raises ValueError for a source that has a weight and no dialogue: another would silently take its share.
    """
    counts, pools, first = Counter(dialogue["source"] for dialogue in dialogues), {}, 0
    for name, source in sources.items():
        if source.weight == 0:
            continue
        if not counts[name]:
            raise ValueError(
                f"source `{name}` has weight {source.weight:g}, but no dialogue to learn from: all are held out, too "
                f"long for `{section}.context`, or ask what the evaluation asks; give it others, or weight 0"
            )
        pools[name] = Pool(range(first, first + counts[name]), source.weight)
        first += counts[name]
    return pools


def plan_steps(data: Data, params: Params, seed: int, num_steps: int | None) -> list[list[list[int]]]:
    """Return the rows of each step, as indices of examples: those of `epochs` passes, or of so many steps.

    Each pass draws an order of its examples, packs them, and draws an order of the rows; of the last one, a part may be
    enough. Passes follow one another without a break; the last step may have fewer rows.
    """
    lengths = [len(example.ids) for example in data.train]
    rows: list[list[int]] = []
    for number, drawn in enumerate(draw_passes(data.pools, seed)):
        if number >= params.epochs if num_steps is None else len(rows) >= num_steps * params.batch_rows:
            break
        rng = np.random.default_rng((seed, number))
        order = rng.permutation(len(drawn)).tolist()
        if num_steps is None and number + 1 > params.epochs:
            order = order[: max(1, round((params.epochs - number) * len(order)))]
        packed = fill_rows(lengths, [drawn[place] for place in order], params.context)
        rows += [packed[place] for place in rng.permutation(len(packed))]
    return [rows[first : first + params.batch_rows] for first in range(0, len(rows), params.batch_rows)][:num_steps]


def draw_passes(pools: Mapping[str, Pool], seed: int) -> Iterator[list[int]]:
    """Yield the examples of one pass after the other, without end.

    A pass has as many as all pools together, divided among them by weight. What rounding leaves over goes to a later
    pass, so that any number of passes has a pool's share to within half an example.
    """
    size, total = sum(len(pool.numbers) for pool in pools.values()), sum(pool.weight for pool in pools.values())
    queues = {name: draw_without_end(name, pool, seed) for name, pool in pools.items()}
    done = dict.fromkeys(pools, 0)
    for number in itertools.count(start=1):
        drawn: list[int] = []
        for name, pool in pools.items():
            due = round(number * size * pool.weight / total)
            drawn += itertools.islice(queues[name], due - done[name])
            done[name] = due
        yield drawn


def draw_without_end(name: str, pool: Pool, seed: int) -> Iterator[int]:
    """Yield a pool's examples again and again, each time in another order, which other pools have no influence on."""
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, number_of(name), epoch))
        yield from (pool.numbers[place] for place in rng.permutation(len(pool.numbers)).tolist())


def drawn_in(steps: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """Return the examples that steps learn from, as often as they do."""
    return [number for rows in steps for row in rows for number in row]


def mean_context(examples: Sequence[Example]) -> int:
    """Return the mean over tokens of the length of their dialogue, which determines the cost of attention."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.float64)
    return round(float((lengths**2).sum() / lengths.sum()))


def last_epoch_begins(training: Training) -> int:
    """Return the step after which the last epoch begins; an epoch is an equal part of the steps."""
    epochs: float = training.stage.params.epochs
    return max(0, math.floor(len(training.steps) * (epochs - 1) / epochs))


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


def save(training: Training, directory: Path, notes: Mapping[str, Any]) -> None:
    """Save the model as it is now; `notes` are written into training.json."""
    progress = training.progress
    written = {"step": progress.step, "tokens": progress.counts["tokens"], "base_sha256": digest_of(training.base)}
    max_shard_bytes = training.stage.params.max_shard_bytes
    save_model(training.engine.module, training.tokenizer, directory, {**written, **notes}, max_shard_bytes)


def report(training: Training) -> dict[str, float]:
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
        "parameters": num_parameters(training.engine.module.config),
        "steps": progress.step,
        "dialogues": len(data.train),
        "dialogues_too_long": len(data.too_long),
        "dialogues_refused": len(data.refused),
        "dialogues_in_evaluation": data.num_in_evaluation,
        "tokens": progress.counts["tokens"],
        "answer_tokens": progress.counts["answer_tokens"],
        "train/loss": progress.train[-1]["loss"],
        **source_figures(data, drawn_in(training.steps)),
        **validation_figures(losses),
        **course_figures(progress.validation, last_epoch_begins(training)),
    }


def source_figures(data: Data, drawn: Sequence[int]) -> dict[str, float]:
    """Return what each source gave: dialogues and answer tokens, counted as often as used, and its share of these."""
    figures: dict[str, float] = {}
    times, num_answer_tokens = Counter(drawn), sum(data.train[number].num_targets for number in drawn)
    for name, pool in data.pools.items():
        own = {
            "dialogues": sum(times[number] for number in pool.numbers),
            "answer_tokens": sum(times[number] * data.train[number].num_targets for number in pool.numbers),
        }
        shares = {
            "epochs": own["dialogues"] / len(pool.numbers),
            "answer_token_share": own["answer_tokens"] / num_answer_tokens,
        }
        figures |= {metric_name(name, what): value for what, value in {**own, **shares}.items()}
    return figures


def course_figures(validation: Sequence[Mapping[str, float]], begin: int) -> dict[str, float]:
    """Return where the validation loss was lowest, and by how many nats the last epoch, from step `begin`, lowered it.

    They tell whether training ended too early (the last epoch still lowered it) or too late (it was lower before).
    """
    best = min(validation, key=lambda row: row["all"])
    before = next(row for row in validation if row["step"] == begin)
    return {
        "validation/all/best_loss": best["all"],
        "validation/all/best_step": best["step"],
        "validation/all/improvement_of_last_epoch": before["all"] - validation[-1]["all"],
    }
