"""The paper's findings about sampling and Ghost Attention, asked of this run's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tasks.judging.wins import share_of
from tasks.reading.prompts import KINDS
from tasks.report.charts import Chart, Series
from tasks.report.evidence import Effect, Evidence, Finding, paired
from tasks.report.outputs import NotRun, Outputs


def best_of_several(outputs: Outputs) -> Evidence:
    """Ask the reward for what the second half of the samples adds, and the judge for what the choice is worth."""
    newest = outputs.newest("rejection_sampling")
    prompts = outputs.lines("rejection_sampling", newest, "samples.jsonl")
    figures = outputs.figures("rejection_sampling", newest)
    table = outputs.table("rejection_sampling", newest, "plots/rewards.csv")
    effects, series = [], []
    for kind in KINDS:
        rewards = [drawn for prompt in prompts if prompt["kind"] == kind for drawn in [rewards_of(prompt)] if drawn]
        if not rewards:
            continue
        most = min(map(len, rewards))
        counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
        if len(counts) < 2:
            raise NotRun("not measured: there is one sample a prompt")
        highest = {count: [expected_maximum(drawn, count) for drawn in rewards] for count in counts}
        words = f"{kind}, highest reward of {counts[-1]} minus of {counts[-2]} samples"
        effects.append(paired(words, highest[counts[-1]], highest[counts[-2]]))
        gain = f"{kind}/judge/utility/gain"
        if gain in figures:
            words = f"{kind}, utility of the chosen minus a random one, by the world's judge"
            effects.append(Effect(words, figures[gain], figures[f"{gain}/low"], figures[f"{gain}/high"]))
        own = table[(table["kind"] == kind) & table["statistic"].isin(["max", "median"])]
        for statistic, part in own.groupby("statistic", sort=False):
            curve = [part[column].tolist() for column in ("samples", "reward", "low", "high")]
            series.append(Series(f"{kind}, {'highest' if statistic == 'max' else 'median'}", *curve))
    if not effects:
        raise NotRun("not measured: no prompt has samples with a reward")
    chart = Chart(f"Highest and median reward of N samples, round {newest}", "samples", "reward", series, log=True)
    return Evidence(effects, chart, "The highest reward can't fall with N; what the judge says of the choice can.")


def temperature(outputs: Outputs) -> Evidence:
    """Ask whether heat costs the best of the samples less than their mean: hottest minus coldest, over all rounds.

    The rounds' prompts differ, so their errors add up as those of independent means; within a round they are taken to
    be independent, too, which makes the interval wider than it is.
    """
    rounds = outputs.entries("rejection_sampling")
    tables = {entry: outputs.table("rejection_sampling", entry, "plots/temperatures.csv") for entry in rounds}
    effects, series = [], []
    for kind in KINDS:
        gains, squares = [], 0.0
        for entry, table in tables.items():
            own = table[table["kind"] == kind]
            if own["temperature"].nunique() < 2:
                continue
            ends = own[own["temperature"].isin([own["temperature"].min(), own["temperature"].max()])]
            signs = [
                (1 if row.temperature == own["temperature"].max() else -1)
                * {"max": 1, "mean": -1}.get(row.statistic, 0)
                for row in ends.itertuples()
            ]
            gains.append(sum(sign * reward for sign, reward in zip(signs, ends["reward"], strict=True)))
            reach = (ends["high"] - ends["low"]) / 2
            squares += sum((sign * half) ** 2 for sign, half in zip(signs, reach, strict=True))
            if entry == rounds[-1]:
                for statistic in ("max", "mean"):
                    part = own[own["statistic"] == statistic].sort_values("temperature")
                    curve = [part[column].tolist() for column in ("temperature", "reward", "low", "high")]
                    series.append(Series(f"{kind}, {'highest' if statistic == 'max' else 'mean'}", *curve))
        if gains:
            value, reach = fmean(gains), math.sqrt(squares) / len(gains)
            words = f"{kind}, what heat does to the highest reward minus what it does to the mean one"
            effects.append(Effect(words, value, value - reach, value + reach))
    if not effects:
        raise NotRun("not measured: every round has tried one temperature: name more in `rejection_sampling`")
    best = {
        kind: ", ".join(
            f"{entry} {figures[place]:g}"
            for entry in rounds
            for figures in [outputs.figures("rejection_sampling", entry)]
            for place in [f"{kind}/temperature"]
            if place in figures
        )
        for kind in KINDS
    }
    note = "Best temperature by round: " + "; ".join(f"{kind} {words}" for kind, words in best.items()) + "."
    chart = Chart(f"Reward of the samples against temperature, round {rounds[-1]}", "temperature", "reward", series)
    return Evidence(effects, chart, note)


def ghost_attention(outputs: Outputs) -> Evidence:
    """Compare a version with the same training without Ghost Attention, conversation by conversation, at the end."""
    outputs.newest("ghost_attention")
    lines = outputs.lines("consistency", "", "judged.jsonl")
    held: dict[str, dict[tuple[str, int], bool]] = {}
    for line in lines:
        held.setdefault(line["checkpoint"], {})[line["conversation"], line["turn"]] = line["held"]
    pairs = {
        name: other for name, other in outputs.params["consistency"]["compared"].items() if {name, other} <= set(held)
    }
    if not pairs:
        raise NotRun("not measured: `consistency.compared` in params.yaml names no version and one without it")
    effects, series = [], []
    for name, other in pairs.items():
        last = max(turn for _, turn in held[name])
        both = [key for key in held[name] if key[1] == last and key in held[other]]
        these, those = ([float(held[each][key]) for key in both] for each in (name, other))
        effects.append(paired(f"instruction kept at turn {last}, {name} minus {other}", these, those, percent=True))
        series += [by_turn(name, held[name]), by_turn(other, held[other])]
    title = "Answers that keep to the instruction, by turn"
    return Evidence(effects, Chart(title, "turn", "answers", series, percent=True))


def by_turn(name: str, held: Mapping[tuple[str, int], bool]) -> Series:
    """Return the share of answers that keep to the instruction at each other turn, with intervals."""
    turns: dict[int, list[bool]] = {}
    for (_, turn), kept in held.items():
        turns.setdefault(turn, []).append(kept)
    shown = [turn for turn in sorted(turns) if turn % 2 == 0] or sorted(turns)
    found = [share_of(turns[turn]) for turn in shown]
    values, lows, highs = ([getattr(each, end) for each in found] for end in ("value", "low", "high"))
    return Series(name, shown, values, lows, highs)


def rewards_of(prompt: Mapping[str, Any]) -> list[float]:
    """Return the rewards of all samples of a prompt; a text that was drawn several times counts as often."""
    return [
        candidate["reward"]
        for candidate in prompt["candidates"]
        if candidate.get("reward") is not None
        for _ in range(candidate["draws"])
    ]


def expected_maximum(values: Sequence[float], count: int) -> float:
    """Return the mean of the highest of `count` values, over all ways to take that many out of all without order."""
    ways = math.comb(len(values), count)
    return sum(value * math.comb(place, count - 1) for place, value in enumerate(sorted(values))) / ways


FINDINGS = [
    Finding(
        "samples", "The best of N samples gets better with N", "section 3.2.3, figure 7", "rejection_sampling",
        "The highest reward among N samples grows with N while the median stays: what rejection sampling can gain.",
        best_of_several,
    ),
    Finding(
        "temperature", "Exploration wants a warmer temperature", "section 3.2.3, figure 8", "rejection_sampling",
        "The temperature with the best of many samples is higher than for one (1.2 to 1.3 for 10 to 100 samples), and "
        "shifts from round to round.", temperature,
    ),
    Finding(
        "ghost_attention", "Ghost Attention keeps an instruction over many turns", "section 3.3, appendix A.3.5",
        "ghost_attention",
        "With it a version keeps its instruction for 20 turns and more; without it, it forgets after a few.",
        ghost_attention,
    ),
]  # fmt: skip
