"""Train a reward model on preferences, for helpfulness or for safety (Llama 2, section 3.2.2).

A chat model, its head replaced by a scalar, learns to score the chosen answer of each pair above the rejected one, by a
margin that depends on the degree of the preference. The safety model also learns from labels whether an answer is safe.
Each uses all pairs of its own kind and a random share of the others. Pairs are packed whole, both answers of a pair in
the same micro batch; a pair longer than the context is left out and listed. A run that was stopped, even killed,
resumes from its last saved state and reaches exactly the weights of an uninterrupted run.

Reads the round's newest chat model, and train.jsonl and validation.jsonl of the round's preferences.
Writes a Hugging Face directory (LlamaForSequenceClassification) with training.json, scores.jsonl (all held-out pairs
scored at the end), too_long.jsonl, and in plots/ train.csv and what tasks/judging/scores.py computes from the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from model.network.checkpoint import load_weights
from model.network.ranks import join_ranks
from model.network.weights import shape_of
from model.scoring.pairs import MARGINS, Margins, Pair, PairBatch, batch_of_pairs, pair_losses
from model.scoring.reward import RewardModel, draw_heads, packed, plan_batches, save_reward
from model.text.dialogue import Message, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, evaluating, num_micro_batches, start_engine, train_step
from tasks.judging.scores import report_scores, scored_pair
from tasks.learning.loop import Progress, Taken, digest_of, read_base, resume, run_steps
from tasks.reading.preferences import Preference, ids_of, read_preferences
from tasks.reading.prompts import Kind
from tasks.reading.rounds import round_of
from tasks.running.files import write_lines
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.plots import Plot
from tasks.running.stage import Stage

PREFERENCES = DATA / "preferences"


class Params(EngineParams, Section):
    """What a reward model learns from and how, and what is watched on the way; a row is an answer, two are a pair."""

    margins: Margins = Field(description="by how much a chosen answer must lead, by degree (Llama 2, table 27)")
    safety_loss_weight: float = Field(ge=0, description="weight of the auxiliary safety loss; 0: safety is not learnt")
    own_public: bool = Field(description="whether to use all open-source pairs of the model's kind, like its own")
    other_share: float = Field(ge=0, lt=1, description="share of other pairs, drawn at random, in all pairs used")
    context: int = Field(gt=1, description="tokens of a dialogue with its answer; pairs with a longer one are left out")
    epochs: int = Field(gt=0, description="uses of each pair")
    num_bins: int = Field(gt=1, description="bins of the calibration and of the histogram of scores")
    log_every: int = Field(gt=0, description="steps between two logged points")
    save_every: int = Field(gt=0, description="steps between two saved states, from which a stopped run resumes")
    max_shard_bytes: int = Field(gt=0, description="maximum bytes of weights in one file of the checkpoint")

    @model_validator(mode="after")
    def _holds_pairs(self) -> Self:
        if self.micro_batch_rows % 2:
            raise ValueError(
                f"micro_batch_rows {self.micro_batch_rows} must be even: both answers of a pair are in one micro batch"
            )
        return self


FIRST_COUNTS = {"pairs": 0, "tokens": 0}  # learnt so far


@dataclass(frozen=True)
class Data:
    """The preferences as tokens, and what was left out."""

    train: list[tuple[Preference, Pair]]
    validation: list[tuple[Preference, Pair]]
    num_own: int  # pairs of `train` that are the model's own
    too_long: list[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One run: what is trained, on what data, and its progress."""

    stage: Stage[Params]
    engine: Any
    data: Data
    steps: list[list[int]]  # the pairs of each step, as indices into data.train
    progress: Progress


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train, score the held-out pairs, save."""
    params, place, section = stage.params, round_of(stage.name), stage.section
    base, kind = Path(place.round.newest), cast(Kind, section.removeprefix("reward_"))
    join_ranks()
    config, tokenizer = read_base(base, params.context, section)
    data = read_data(PREFERENCES / place.name, kind, params, tokenizer, stage.seed, section)
    steps = plan_steps(len(data.train), params, stage.seed)
    model = build_model(partial(RewardModel, tells_safety=params.safety_loss_weight > 0), config, params)
    load_weights(model, base, part="model")
    draw_heads(model, stage.seed)
    engine = start_engine(model, params, len(steps))
    engines = {"model": engine}
    progress = resume(stage, engines, Progress(dict(FIRST_COUNTS)))
    training = Training(stage, engine, data, steps, progress)
    run_steps(stage, engines, progress, len(steps), partial(take_step, training))
    written = {"step": progress.step, "tokens": progress.counts["tokens"], "base_sha256": digest_of(base)}
    save_reward(model, tokenizer, stage.output, written, params.max_shard_bytes)
    return report(training, tokenizer)


# --- what it learns from ---


def read_data(directory: Path, kind: Kind, params: Params, tokenizer: Tokenizer, seed: int, section: str) -> Data:
    """Read a round's preferences, select what the model of this kind learns from, and encode it.

    Raises ValueError when nothing is left to train or to validate on, and when safety is to be learnt but all labels
    say the same.
    """
    preferences, held_out = (read_preferences(directory / f"{name}.jsonl") for name in ("train", "validation"))
    own, others = share_out(preferences, kind, params, seed)
    parts = [encode(part, params, tokenizer) for part in (own, others, held_out)]
    fitting, others_fitting, validation = (part for part, _ in parts)
    for use, given, left in (("train", own, fitting), ("validate", held_out, validation)):
        if not left:
            raise ValueError(
                f"no pair is left to {use} on: {directory} has {len(given)}, and none fits into `{section}.context` "
                f"{params.context} tokens; add preferences, set `{section}.own_public`, or raise the context"
            )
    train = fitting + others_fitting
    if params.safety_loss_weight:
        check_safety_labels([pair for _, pair in train], section)
    return Data(train, validation, len(fitting), [each for _, too_long in parts for each in too_long])


def share_out(
    preferences: Sequence[Preference], kind: Kind, params: Params, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Return all of a model's own pairs, and as many of the others as `other_share` asks for, or all of them.

    Its own pairs are those of its kind; open-source ones count only if `own_public` is set. (Llama 2: the helpfulness
    model uses as many other pairs as own ones; for the safety model, whose own include open-source pairs, one in ten
    pairs is another.)
    """
    own: list[Preference] = []
    others: list[Preference] = []
    for preference in preferences:
        is_own = preference.kind == kind and (params.own_public or preference.round is not None)
        (own if is_own else others).append(preference)
    wanted = round(len(own) * params.other_share / (1 - params.other_share))
    order = np.random.default_rng((seed, 0)).permutation(len(others))
    return own, [others[number] for number in sorted(order[:wanted])]


def encode(
    preferences: Sequence[Preference], params: Params, tokenizer: Tokenizer
) -> tuple[list[tuple[Preference, Pair]], list[dict[str, Any]]]:
    """Return the preferences that fit into the context, with their tokens, and the names of those that don't.

    Raises ValueError, naming the pair, for one that is not a dialogue.
    """
    fitting, too_long = [], []
    for preference in preferences:
        chosen, rejected = (ids_of(preference, text, tokenizer) for text in (preference.chosen, preference.rejected))
        longest = max(len(chosen), len(rejected))
        if longest > params.context:
            too_long.append({"source": preference.source, "id": preference.id, "num_tokens": longest})
            continue
        margin = MARGINS[params.margins][preference.degree]
        pair = Pair(chosen, rejected, margin, preference.chosen_safe, preference.rejected_safe)
        fitting.append((preference, pair))
    return fitting, too_long


def check_safety_labels(pairs: Sequence[Pair], section: str) -> None:
    """Raise ValueError when all safety labels say the same: the head would learn to say only that."""
    labels = [label for pair in pairs for label in (pair.chosen_safe, pair.rejected_safe) if label is not None]
    if len(set(labels)) < 2:
        found = f"all {len(labels)} say {'safe' if labels[0] else 'unsafe'}" if labels else "there are none"
        raise ValueError(
            f"params.yaml: `{section}.safety_loss_weight` asks to learn from safety labels, but {found}: look at the "
            "annotators' labels, or set the weight to 0"
        )


def plan_steps(num_pairs: int, params: Params, seed: int) -> list[list[int]]:
    """Return the pairs of each step, as indices: each epoch in its own random order; the last step may have fewer."""
    order = [
        number
        for epoch in range(params.epochs)
        for number in np.random.default_rng((seed, 1 + epoch)).permutation(num_pairs).tolist()
    ]
    pairs_a_step = params.batch_rows // 2
    return [order[first : first + pairs_a_step] for first in range(0, len(order), pairs_a_step)]


# --- training ---


def take_step(training: Training) -> Taken:
    """Train on the next step's pairs."""
    params, numbers = training.stage.params, training.steps[training.progress.step]
    preferences = [training.data.train[number] for number in numbers]
    num_right = torch.zeros((), device=training.engine.device)

    def loss_of(engine: Any, batch: PairBatch) -> Tensor:
        losses_P, leads_P = pair_losses(engine, batch, params.safety_loss_weight)
        num_right.add_(batch.weight * (0.5 + 0.5 * leads_P.detach().sign()).sum())
        return losses_P.sum()

    step = train_step(
        training.engine,
        micro_batches(training, numbers),
        loss_of,
        len(numbers),
        lambda loss, gradient_norm: math.isfinite(loss) and math.isfinite(gradient_norm),
    )
    torch.distributed.all_reduce(num_right)
    return Taken(
        found={
            "loss": step.loss,
            "accuracy": float(num_right) / len(numbers),
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
        },
        used={"pairs": len(numbers), "tokens": sum(len(ids) for _, pair in preferences for ids in pair[:2])},
        sources=lambda: [f"{preference.source} {preference.id}" for preference, _ in preferences],
    )


def micro_batches(training: Training, numbers: Sequence[int]) -> list[PairBatch]:
    """Return this rank's share of a step's pairs.

    If pairs run out, in the last step, a rank keeps in step with the others on a pair that it doesn't learn from.
    """
    params, device = training.stage.params, training.engine.device
    num_micro = num_micro_batches(params, torch.distributed.get_world_size())
    pairs_at_once = params.micro_batch_rows // 2
    first = torch.distributed.get_rank() * num_micro
    batches = []
    for turn in range(first, first + num_micro):
        own = numbers[turn * pairs_at_once : (turn + 1) * pairs_at_once]
        pairs = [training.data.train[number][1] for number in own or numbers[:1]]
        batches.append(batch_of_pairs(pairs, device, weight=1.0 if own else 0.0))
    return batches


# --- the end ---


def held_out_scores(training: Training) -> list[tuple[float, float]]:
    """Return the scores of both answers of each held-out pair; the ranks share the dialogues."""
    engine, params = training.engine, training.stage.params
    dialogues = [ids for _, pair in training.data.validation for ids in (pair.chosen, pair.rejected)]
    batches = plan_batches(dialogues, params.micro_batch_rows * params.context)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scores = torch.zeros(len(dialogues), device=engine.device)
    with evaluating(engine):
        for turn in range(rank, rank + len(batches), world):
            batch = batches[min(turn, len(batches) - 1)]
            found = engine(*packed([dialogues[number] for number in batch], engine.device))
            if turn < len(batches):  # past the end, a rank only keeps in step with the others, which need its weights
                scores[batch] = found
    torch.distributed.all_reduce(scores)
    values = scores.tolist()
    return list(zip(values[::2], values[1::2], strict=True))


def report(training: Training, tokenizer: Tokenizer) -> dict[str, float]:
    """Score the held-out pairs; write the scores, the curve and what was left out; return the figures."""
    import pandas

    stage, data, progress = training.stage, training.data, training.progress
    rows = []
    for (preference, pair), scores in zip(data.validation, held_out_scores(training), strict=True):
        prompt = encode_prompt(cast(list[Message], preference.messages), tokenizer)
        lengths = len(pair.chosen) - len(prompt), len(pair.rejected) - len(prompt)
        rows.append(scored_pair(preference.model_dump(), scores, lengths))
    figures: dict[str, float] = {
        "parameters": sum(shape_of(weight).numel() for weight in training.engine.module.parameters()),
        "steps": progress.step,
        "pairs_trained": len(data.train),
        "pairs_own": data.num_own,
        "pairs_too_long": len(data.too_long),
        "tokens": progress.counts["tokens"],
        "train/loss": progress.train[-1]["loss"],
        "train/accuracy": progress.train[-1]["accuracy"],
    }
    if stage.rank == 0:
        write_lines(stage.output / "scores.jsonl", rows)
        write_lines(stage.output / "too_long.jsonl", data.too_long)
        figures |= report_scores(stage, rows)
        loss = Plot("curves", "Training loss", "tokens", "loss", "tokens", "nats per pair")
        stage.plot("train", pandas.DataFrame(progress.train), loss)
    return figures
