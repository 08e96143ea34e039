"""Train the base model on the stream of tokens (Llama 2, section 2.2; LLaMA, sections 2.2 to 2.4).

Every token of the stream is used once, in the stream's order, whatever the number of ranks. A run that was stopped,
even killed, resumes from its last saved state and reaches exactly the weights of an uninterrupted run. Attention stays
within a document. AdamW, linear warm-up, then a cosine; the gradient norm is clipped.

A step whose loss or gradient norm is far above that of the steps before it, usually because of bad text, is a spike. It
is recorded with its documents and, if `skip_spikes` is set, its update is skipped; but at most `max_skipped` times in a
row, because a longer series is not bad text. A loss that is not finite stops the stage.

Reads data/tokenize, data/train_tokenizer/tokenizer.model and, with `init_from`, a Hugging Face Llama directory.
Writes a Hugging Face Llama directory with training.json, plots/train.csv and plots/validation.csv.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from model.network.checkpoint import load_weights, read_config, save_model
from model.network.packing import batch_of_rows, num_rows, num_targets
from model.network.ranks import join_ranks
from model.network.transformer import Architecture, Llama, ModelConfig, flops_per_token, num_parameters
from model.text.tokenizer import Tokenizer
from model.training.engine import (
    EngineParams,
    Step,
    build_model,
    draw_weights,
    evaluating,
    num_micro_batches,
    start_engine,
    token_loss,
    train_step,
)
from tasks.learning.loop import Progress, Taken, resume, run_steps, write_curves
from tasks.learning.stream import Text, read_stream
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.places import DATA, NOTHING
from tasks.running.stage import Stage, start

STREAM = DATA / "tokenize"
TOKENIZER = DATA / "train_tokenizer" / "tokenizer.model"


class Params(Architecture, EngineParams, Section):
    """The model, how it is trained, and what is watched on the way."""

    init_from: str = Field(
        min_length=1, description="Hugging Face Llama directory to start from; data/seeds/none: random weights"
    )
    num_ranks: int | None = Field(gt=0, description="processes on this host; null: `machine.num_ranks`")
    log_every: int = Field(gt=0, description="steps between two logged points")
    validate_every: int = Field(gt=0, description="steps between two validations")
    max_validation_tokens: int = Field(gt=0, description="maximum tokens of each source's held-out text to use")
    save_every: int = Field(gt=0, description="steps between two saved states, from which a stopped run resumes")
    spike_window: int = Field(gt=1, description="number of preceding steps that a step is compared with")
    spike_loss_ratio: float = Field(gt=1, description="loss above this many medians of the window is a spike")
    spike_gradient_ratio: float = Field(gt=1, description="gradient norm above this many medians is a spike")
    skip_spikes: bool = Field(description="skip the update of a step that is a spike")
    max_skipped: int = Field(gt=0, description="maximum updates skipped in a row")
    max_shard_bytes: int = Field(gt=0, description="maximum bytes of weights in one file of the checkpoint")


@dataclass(frozen=True)
class Training:
    """One run: what is trained, on what data, and its progress."""

    stage: Stage[Params]
    engine: Any
    train: Text
    validation: dict[str, Text]
    progress: Progress


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train, validate, save."""
    params, context = stage.params, stage.params.max_position_embeddings
    join_ranks()
    tokenizer = Tokenizer(TOKENIZER)
    config = config_of(params, tokenizer.vocab_size)
    train, validation = read_stream(STREAM)
    num_steps = count_steps(train, params)
    model = build_model(Llama, config, params)
    set_weights(model, Path(params.init_from), stage.seed)
    engine = start_engine(model, params, num_steps)
    engines = {"model": engine}
    progress = resume(stage, engines, Progress({"tokens": 0}, first_notes()))
    training = Training(stage, engine, train, validation, progress)
    run_steps(
        stage,
        engines,
        progress,
        num_steps,
        partial(take_step, training),
        validate=partial(validate, training),
        flops_per_token=flops_per_token(config, context),
    )
    written = {"step": num_steps, "tokens": progress.counts["tokens"]}
    save_model(model, tokenizer, stage.output, written, params.max_shard_bytes)
    return report(training, num_parameters(config))


# --- what it starts from ---


def config_of(params: Params, vocab_size: int) -> ModelConfig:
    """Return the model that params.yaml and the tokenizer describe, with the RoPE scaling of `init_from`."""
    values = {name: getattr(params, name) for name in Architecture.model_fields}
    base = Path(params.init_from)
    rope_scaling = None if base == NOTHING else read_config(base).rope_scaling
    return ModelConfig(**values, vocab_size=vocab_size, rope_scaling=rope_scaling)


def count_steps(train: Text, params: Params) -> int:
    """Return the number of full steps that the stream has; the rest, less than a step, is unused.

    Raises ValueError when there is not even one.
    """
    context = params.max_position_embeddings
    num_steps = num_rows(train.tokens, context) // params.batch_rows
    if num_steps == 0:
        raise ValueError(
            f"{STREAM} holds {len(train.tokens)} tokens, less than one step of `pretrain.batch_rows` "
            f"{params.batch_rows} x `pretrain.max_position_embeddings` {context} tokens: add text, or lower one of them"
        )
    return num_steps


def set_weights(model: Llama, base: Path, seed: int) -> None:
    """Initialise a model's weights, or read them.

    Raises ValueError when the model to start from differs from the one that params.yaml describes.
    """
    if base == NOTHING:
        draw_weights(model, seed)
        return
    found, free = read_config(base), ("initializer_range", "max_position_embeddings")
    for name, wanted in model.config:
        value = getattr(found, name)
        if name not in free and value != wanted:
            raise ValueError(
                f"params.yaml: `pretrain.init_from` names {base}, whose {name} is {value}, and this run's is "
                f"{wanted}: give it the same (a vocabulary comes with its tokenizer)"
            )
    load_weights(model, base)


# --- training ---


def first_notes() -> dict[str, Any]:
    """Return this stage's notes before its first step; with lists, as JSON restores them."""
    return {
        "losses": [],  # of the last steps that were not spikes
        "gradient_norms": [],
        "num_skipped": 0,  # updates skipped in a row
        "spikes": [],  # rows of the table: one per document
    }


def take_step(training: Training) -> Taken:
    """Train on the next step's rows, unless they are a spike to be skipped."""
    params, progress, notes = training.stage.params, training.progress, training.progress.notes
    context, train = params.max_position_embeddings, training.train
    first_row = progress.step * params.batch_rows
    begin, end = first_row * context, (first_row + params.batch_rows) * context
    spiked = False

    def accepts(loss: float, gradient_norm: float) -> bool:
        nonlocal spiked
        spiked = is_spike(params, notes, loss, gradient_norm)
        skipped = spiked and params.skip_spikes and notes["num_skipped"] < params.max_skipped
        return math.isfinite(loss) and math.isfinite(gradient_norm) and not skipped

    micro_batches = [
        batch_of_rows(train.tokens, train.starts, row, params.micro_batch_rows, context, training.engine.device)
        for row in own_rows(params, first_row)
    ]
    step = train_step(training.engine, micro_batches, token_loss, num_targets(train.starts, begin, end), accepts)
    if spiked:
        note_spike(training, step, begin, end)
    if not spiked:
        notes["num_skipped"] = 0
    elif not step.updated:
        notes["num_skipped"] += 1
    if not spiked or (params.skip_spikes and step.updated):  # a spike beyond max_skipped is the new normal
        notes["losses"] = [*notes["losses"], step.loss][-params.spike_window :]
        notes["gradient_norms"] = [*notes["gradient_norms"], step.gradient_norm][-params.spike_window :]
    return Taken(
        found={"loss": step.loss, "gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate},
        used={"tokens": end - begin},
        sources=lambda: [f"{document['source']} {document['id']}" for document in train.documents_in(begin, end)],
    )


def own_rows(params: Params, first_row: int) -> range:
    """Return the first row of each of this rank's micro batches in the step that begins at `first_row`."""
    num_micro = num_micro_batches(params, torch.distributed.get_world_size())
    own = first_row + torch.distributed.get_rank() * num_micro * params.micro_batch_rows
    return range(own, own + num_micro * params.micro_batch_rows, params.micro_batch_rows)


def is_spike(params: Params, notes: Mapping[str, Any], loss: float, gradient_norm: float) -> bool:
    """Return whether a step is far above those before it; False for the first steps, which have no full window."""
    if len(notes["losses"]) < params.spike_window:
        return False
    highest_loss: float = params.spike_loss_ratio * statistics.median(notes["losses"])
    highest_norm: float = params.spike_gradient_ratio * statistics.median(notes["gradient_norms"])
    return loss > highest_loss or gradient_norm > highest_norm


def note_spike(training: Training, step: Step, begin: int, end: int) -> None:
    """Add the documents of tokens `begin` to `end` to the table of spikes."""
    import pandas

    notes = training.progress.notes
    found = {
        "step": training.progress.step + 1,
        "loss": step.loss,
        "median_loss": statistics.median(notes["losses"]),
        "gradient_norm": step.gradient_norm,
        "median_gradient_norm": statistics.median(notes["gradient_norms"]),
        "updated": step.updated,
    }
    documents = training.train.documents_in(begin, end)
    notes["spikes"] += [{**found, "source": document["source"], "id": document["id"]} for document in documents]
    if training.stage.rank == 0:
        pandas.DataFrame(notes["spikes"]).to_csv(training.stage.tables / "spikes.csv", index=False)


# --- validation ---


def validate(training: Training) -> None:
    """Log the mean loss in nats per token, and its perplexity, for each source's held-out text and overall."""
    sums = {name: loss_sum(training, text) for name, text in training.validation.items()}
    together = sum(total for total, _ in sums.values()), sum(count for _, count in sums.values())
    named = {"all": together, **{metric_name(name): own for name, own in sums.items()}}
    losses = {name: total / max(1, count) for name, (total, count) in named.items()}
    progress = training.progress
    at = {"step": progress.step, "tokens": progress.counts["tokens"]}
    progress.validation.append({**at, **losses})
    training.stage.log(validation_figures(losses), **at)


def validation_figures(losses: dict[str, float]) -> dict[str, float]:
    """Return the losses and their perplexities by their metric names."""
    named = {f"validation/{name}/loss": loss for name, loss in losses.items()}
    return named | {f"validation/{name}/perplexity": math.exp(loss) for name, loss in losses.items()}


def loss_sum(training: Training, text: Text) -> tuple[float, float]:
    """Return a text's summed loss, and its number of predicted tokens; the ranks share its rows."""
    params, engine = training.stage.params, training.engine
    rows, context = params.micro_batch_rows, params.max_position_embeddings
    num_batches = -(-min(len(text.tokens), params.max_validation_tokens) // (rows * context))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    totals = torch.zeros(2, dtype=torch.float64)
    with evaluating(engine):
        for first in range(0, num_batches, world):
            own = first + rank  # past the end, a rank only keeps in step with the others, which need its weights
            row = min(own, num_batches - 1) * rows
            batch = batch_of_rows(text.tokens, text.starts, row, rows, context, engine.device)
            loss = engine(batch.ids, batch.documents, batch.targets).double().sum()
            if own < num_batches:
                totals += torch.tensor([float(loss), batch.num_targets], dtype=torch.float64)
    totals = totals.to(engine.device)
    torch.distributed.all_reduce(totals)
    total, count = totals.tolist()
    return total, count


# --- the end ---


def report(training: Training, parameters: int) -> dict[str, float]:
    """Write the curves; return the figures."""
    stage, progress = training.stage, training.progress
    write_curves(stage, progress.train, progress.validation, part="source")
    losses = {name: loss for name, loss in progress.validation[-1].items() if name not in ("step", "tokens")}
    return {
        "parameters": parameters,
        "steps": progress.step,
        "tokens": progress.counts["tokens"],
        "train/loss": progress.train[-1]["loss"],
        "spikes": len({spike["step"] for spike in progress.notes["spikes"]}),
        **validation_figures(losses),
    }


if __name__ == "__main__":
    start(Params, run)
