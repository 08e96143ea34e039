"""The paper's findings about preferences and reward models, asked of this run's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.judging.intervals import wilson
from tasks.judging.wins import mean_of
from tasks.reading.prompts import DEGREES, KINDS
from tasks.report.charts import Chart, Series
from tasks.report.evidence import Effect, Evidence, Finding, of_shares, paired
from tasks.report.outputs import NotRun, Outputs

RIGHT = "held-out pairs that it gets right"
Rights = Mapping[str, float]  # by the pair's id: 1 if the chosen answer scores higher, a half if both score the same


def unsure(outputs: Outputs) -> Evidence:
    """Compare the share of hard choices in the last batch with that in the first."""
    rounds = outputs.entries("preferences")
    effects, series = [], []
    for kind in KINDS:
        counts = {}
        for entry in rounds:
            table = outputs.table("preferences", entry, "plots/degrees.csv")
            own = table[table["bar"].str.startswith(f"{kind}: ")]
            hard = own[own["bar"] == f"{kind}: {DEGREES[-1]}"]
            if len(own):
                counts[entry] = (float(hard["pairs"].sum()), int(own["pairs"].sum()))
        if len(counts) > 1:
            (first, *_), (*_, last) = counts, counts
            words = f"{kind}, pairs with a negligible difference, batch {last} minus {first}"
            effects.append(of_shares(words, *counts[last], *counts[first]))
            series.append(shares(kind, counts))
    if not effects:
        raise NotRun("not measured: fewer than two batches have degrees")
    chart = Chart("Share of pairs whose answers differ negligibly", "batch", "pairs", series, percent=True)
    return Evidence(effects, chart)


def degrees(outputs: Outputs) -> Evidence:
    """Compare the newest models' accuracy on pairs of the clearest and of the slightest preference."""
    effects, series = [], []
    for kind in KINDS:
        section = f"reward_{kind}"
        table = outputs.table(section, outputs.newest(section), "plots/accuracy.csv").set_index("part")
        counts: dict[str, tuple[float, int]] = {
            degree: (round(2 * row["accuracy"] * row["pairs"]) / 2, int(row["pairs"]))
            for degree in DEGREES
            if f"{kind}/{degree}" in table.index
            for row in [table.loc[f"{kind}/{degree}"]]
        }
        if len(counts) > 1:
            (clear, *_), (*_, slight) = counts, counts
            words = f"accuracy of the {kind} model, {clear} better minus {slight} better"
            effects.append(of_shares(words, *counts[clear], *counts[slight]))
            series.append(shares(f"{kind} model, {kind} pairs", counts))
    if not effects:
        raise NotRun("not measured: the held-out pairs have no degrees")
    title = "Accuracy by how much better the chosen answer is"
    return Evidence(effects, Chart(title, "degree of the preference", RIGHT, series, percent=True, level=0.5))


def specialists(outputs: Outputs) -> Evidence:
    """Compare both newest models on the same pairs: each should do better on its own kind."""
    found = {kind: outputs.lines(f"reward_{kind}", outputs.newest(f"reward_{kind}"), "scores.jsonl") for kind in KINDS}
    effects, accuracies = [], {}
    for kind in KINDS:
        rights = {model: rights_of(lines, kind) for model, lines in found.items()}
        (other,) = [each for each in KINDS if each != kind]
        both = [pair for pair in rights[kind] if pair in rights[other]]
        for model in KINDS:
            accuracies[model, kind] = [rights[model][pair] for pair in both]
        words = f"accuracy on {kind} pairs, {kind} model minus {other} model"
        effects.append(paired(words, accuracies[kind, kind], accuracies[other, kind], percent=True))
    series = [
        shares(f"{model} model", {f"{kind} pairs": totals(accuracies[model, kind]) for kind in KINDS})
        for model in KINDS
    ]
    chart = Chart("Accuracy of both models on both kinds of pairs", "held-out", RIGHT, series, True, 0.5, joined=False)
    return Evidence(effects, chart)


def drift(outputs: Outputs) -> Evidence:
    """Compare a batch's own reward model with one of an earlier round, on the batch's held-out pairs."""
    names = outputs.entries("reward_drift")
    comparisons = outputs.params["reward_drift"]["comparisons"]
    effects, series = [], []
    for kind in KINDS:
        section = f"reward_{kind}"
        older: dict[str, list[float]] = {}
        newer: dict[str, list[float]] = {}
        for name in names:
            batch = comparisons[name]["batch"]
            lines = outputs.lines("reward_drift", name, "scores.jsonl")
            old = rights_of([line for line in lines if line["model"] == section], kind)
            new = rights_of(outputs.lines(section, batch, "scores.jsonl"), kind)
            both = [pair for pair in old if pair in new]
            if both:
                older[batch], newer[batch] = [old[pair] for pair in both], [new[pair] for pair in both]
        if older:
            (these, those) = ([right for own in each.values() for right in own] for each in (newer, older))
            words = f"accuracy on the newest {kind} pairs, the batch's own model minus an earlier round's"
            effects.append(paired(words, these, those, percent=True))
            for words, each in ((f"{kind}: earlier model", older), (f"{kind}: own model", newer)):
                series.append(shares(words, {batch: totals(own) for batch, own in each.items()}))
    if not effects:
        raise NotRun("not measured: no batch has pairs that both models have scored")
    chart = Chart("Accuracy of the earlier and of its own model on each batch", "batch", RIGHT, series, True, 0.5)
    return Evidence(effects, chart, "The batch's own model has also learnt from more pairs.")


def scaling(outputs: Outputs) -> Evidence:
    """Compare trainings on the most and the fewest pairs, and of the largest and the smallest model, seed by seed."""
    table = outputs.table("reward_scaling", "", "runs.csv")
    most, fewest = int(table["pairs"].max()), int(table["pairs"].min())
    large, small = int(table["layers"].max()), int(table["layers"].min())
    accuracy = {(row.layers, row.pairs, row.seed): row.accuracy for row in table.itertuples()}
    seeds = sorted(set(table["seed"]))
    effects = []
    if most > fewest:
        these, those = ([accuracy[large, pairs, seed] for seed in seeds] for pairs in (most, fewest))
        effects.append(paired(f"accuracy from {most} minus from {fewest} pairs, {large} layers", these, those, True))
    if large > small:
        these, those = ([accuracy[layers, most, seed] for seed in seeds] for layers in (large, small))
        effects.append(paired(f"accuracy with {large} minus {small} layers, {most} pairs", these, those, True))
    if not effects:
        raise NotRun("not measured: the study `reward_scaling` has one size and one amount of data")
    series = []
    for layers in sorted(set(table["layers"])):
        amounts = sorted(set(table.loc[table["layers"] == layers, "pairs"]))
        found = [mean_of([accuracy[layers, pairs, seed] for seed in seeds]) for pairs in amounts]
        values, lows, highs = ([getattr(each, name) for each in found] for name in ("value", "low", "high"))
        series.append(Series(f"{layers} layer{'s' * (layers > 1)}", amounts, values, lows, highs))
    title = "Accuracy against amount of data and size"
    return Evidence(effects, Chart(title, "pairs learnt from", RIGHT, series, percent=True, log=True))


def distillation(outputs: Outputs) -> Evidence:
    """Compare a smaller model that learns the largest one's samples with one that learns demonstrations alone."""
    figures, table = outputs.figures("distillation"), outputs.table("distillation", "", "plots/loss.csv")
    effects = []
    for name in figures:
        place, _, figure = name.partition("/distilled/")
        if figure == "validation_loss" and f"{place}/demonstrations/validation_loss" in figures:
            gain = figures[f"{place}/demonstrations/validation_loss"] - figures[name]
            words = f"{place.replace('_', ' ')}: fall of the validation loss by the largest model's samples, nats"
            effects.append(Effect(words, gain, None, None))
    if not effects:
        raise NotRun("not measured: the study `distillation` trained no model on both")
    series = [
        Series(str(model), part["tokens"].tolist(), part["loss"].tolist())
        for model, part in table.groupby("model", sort=False)
    ]
    chart = Chart("Smaller models, validation loss by what they learn from", "tokens", "nats per token", series)
    return Evidence(effects, chart, "One training each: without an interval, nothing can be told.")


# --- pairs ---


def rights_of(lines: Sequence[Mapping[str, Any]], kind: str) -> Rights:
    """Return, of the scored pairs of one kind, which ones are right."""
    return {
        line["id"]: 0.5 if chosen == rejected else float(chosen > rejected)
        for line in lines
        if line["kind"] == kind
        for chosen, rejected in [(line["chosen_score"], line["rejected_score"])]
    }


def totals(rights: Sequence[float]) -> tuple[float, int]:
    """Return how many pairs are right, and how many there are."""
    return sum(rights), len(rights)


def shares(name: str, counts: Mapping[str, tuple[float, int]]) -> Series:
    """Return shares, by their names, as a curve with Wilson's intervals; `counts`: hits and all."""
    ends = [wilson(hits, count) for hits, count in counts.values()]
    values = [hits / count for hits, count in counts.values()]
    return Series(name, list(counts), values, [low for low, _ in ends], [high for _, high in ends])


FINDINGS = [
    Finding(
        "unsure", "Choices get harder from batch to batch", "appendix A.3.1, figure 25", "preferences",
        "As the versions improve, more pairs are judged “negligibly better or unsure”.", unsure,
    ),
    Finding(
        "degrees", "Reward models are surer where people are", "section 3.2.2, table 8", "reward_helpfulness",
        "Accuracy falls from over 90% on significantly better answers to near 50% on negligibly better ones.", degrees,
    ),
    Finding(
        "specialists", "Each reward model is best at its own kind", "section 3.2.2, table 7", "reward_safety",
        "The helpfulness model does best on helpfulness pairs and the safety model on safety pairs: the two aims pull "
        "apart.", specialists,
    ),
    Finding(
        "scaling", "More data and larger models make better reward models", "section 3.2.2, figure 6",
        "reward_helpfulness", "Accuracy rises with the amount of data and with size, not yet levelling out.", scaling,
    ),
    Finding(
        "drift", "Reward models fall behind newer answers", "section 3.1", "reward_drift",
        "Accuracy quickly degrades on answers of newer models, so that each round needs pairs of its own.", drift,
    ),
    Finding(
        "distillation", "Smaller models learn from the largest one's samples", "section 3.2.3", "distillation",
        "Only the largest model samples; smaller ones are fine-tuned on its best answers.", distillation,
    ),
]  # fmt: skip
