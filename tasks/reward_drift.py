"""Measure how well an earlier round's reward models judge a later round's pairs (Llama 2, section 3.2.1).

Each batch is collected with a newer chat model. What earlier reward models get wrong in it shows what training new ones
gains: they score the batch's own held-out pairs, none of which they have seen.

Run once for each comparison (`reward_drift@v1_on_v2`). Reads both reward models of the earlier round, and the later
round's preferences. Writes scores.jsonl (like a reward model's, plus `model`) and plots/accuracy.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field

from model.network.ranks import join_ranks
from model.scoring.reward import open_reward, score_on_ranks
from model.text.dialogue import Message, encode_prompt
from tasks.judging.scores import ACCURACY, accuracies_of, accuracy_figures, accuracy_table, plot_by_degree, scored_pair
from tasks.reading.preferences import Preference, ids_of, read_preferences
from tasks.reading.rounds import round_number
from tasks.running.files import write_lines
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.stage import Stage, start

MODELS = ("reward_helpfulness", "reward_safety")


class Comparison(Section):
    """Which round's models score which round's pairs."""

    model: str = Field(min_length=1, description="round of the reward models")
    batch: str = Field(min_length=1, description="later round whose own held-out pairs they score")


class Params(Section):
    """Which models score which pairs, and how."""

    comparisons: dict[str, Comparison] = Field(description="the comparisons, by the name of the stage's entry")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more take more memory")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Score the batch with each model, report."""
    comparison = comparison_of(stage)
    pairs = read_batch(DATA / "preferences" / comparison.batch, comparison.batch)
    device = join_ranks()
    figures: dict[str, float] = {"pairs": len(pairs)}
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        found, num_too_long = score_pairs(stage.params, DATA / name / comparison.model, pairs, device)
        rows += [{"model": name, **row} for row in found]
        figures[f"{name}/pairs_too_long"] = num_too_long
    if stage.rank == 0:
        write_lines(stage.output / "scores.jsonl", rows)
        figures |= report(stage, rows)
    return figures


def comparison_of(stage: Stage[Params]) -> Comparison:
    """Return the comparison that this run of the stage is about.

    Raises ValueError when params.yaml doesn't have it, and when its batch is not of a later round than its models.
    """
    item, known = stage.entry, stage.params.comparisons
    if item not in known:
        names = ", ".join(f"reward_drift@{name}" for name in known) or "none"
        raise ValueError(f"`reward_drift.comparisons` has no `{item}`: it has {names}")
    found = known[item]
    if round_number(found.batch) <= round_number(found.model):
        raise ValueError(
            f"params.yaml: `reward_drift.comparisons.{item}`: batch {found.batch} is not later than model "
            f"{found.model}: name a batch that the models can't have learnt from"
        )
    return found


def read_batch(directory: Path, round_name: str) -> list[Preference]:
    """Return the held-out pairs that the round itself collected. Raises ValueError when there are none."""
    pairs = [pair for pair in read_preferences(directory / "validation.jsonl") if pair.round == round_name]
    if not pairs:
        raise ValueError(f"{directory / 'validation.jsonl'} holds no pair of round {round_name}: nothing to compare on")
    return pairs


def score_pairs(
    params: Params, checkpoint: Path, pairs: Sequence[Preference], device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """Return the pairs with their scores, and how many were too long for the model; the ranks share the work.

    Raises ValueError as `model.network.checkpoint` does, and when all pairs are too long.
    """
    model, tokenizer = open_reward(checkpoint, params.precision, device)
    context = model.config.max_position_embeddings
    fitting, dialogues, lengths = [], [], []
    for pair in pairs:
        both = [ids_of(pair, answer, tokenizer) for answer in (pair.chosen, pair.rejected)]
        if max(map(len, both)) <= context:
            prompt = len(encode_prompt(cast(list[Message], pair.messages), tokenizer))
            fitting.append(pair)
            dialogues += both
            lengths.append([len(ids) - prompt for ids in both])
    if not fitting:
        raise ValueError(f"all {len(pairs)} pairs are longer than the {context} tokens of {checkpoint}: none to score")
    scores = score_on_ranks(model, dialogues, params.tokens_at_once)
    both_scores = zip(scores[::2], scores[1::2], strict=True)
    rows = [
        scored_pair(pair.model_dump(), found, counts)
        for pair, found, counts in zip(fitting, both_scores, lengths, strict=True)
    ]
    return rows, len(pairs) - len(fitting)


def report(stage: Stage[Params], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Write the accuracies of both models as a plot, a table and pictures; return them."""
    import pandas

    figures: dict[str, float] = {}
    tables = []
    for name in MODELS:
        accuracies = accuracies_of(pandas.DataFrame([row for row in rows if row["model"] == name]))
        figures |= {f"{name}/{figure}": value for figure, value in accuracy_figures(accuracies).items()}
        table = accuracy_table(accuracies)
        tables.append(table.assign(part=f"{name}/" + table["part"]))
        plot_by_degree(stage, f"{name}_accuracy_by_degree", accuracies)
    accuracies_of_both = pandas.concat(tables)
    stage.plot("accuracy", accuracies_of_both, ACCURACY)
    accuracies_of_both.to_csv(stage.tables / "accuracy.csv", index=False)
    return figures


if __name__ == "__main__":
    start(Params, run)
