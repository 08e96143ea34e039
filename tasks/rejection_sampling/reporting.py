"""Report the choice: rewards against number of samples and temperature, and what the truth says of what is chosen.

A figure at N is the mean over all ways to draw N of a prompt's K samples (tasks.judging.ranking), not of the first N.
If the reward goes on rising with N where the judge's utility falls, the reward model is over-optimised: K should be
less. Means over prompts hold rewards of both branches, which calibration has made log-odds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.judging.intervals import mean_interval, wilson
from tasks.judging.ranking import Scales, chances_of_middle, chances_of_place
from tasks.reading.prompts import KINDS, Kind
from tasks.running.plots import Plot
from tasks.running.stage import Stage
from tasks.sampling.choosing import Choice
from tasks.world.annotators import Annotator, mean_utility
from tasks.world.judge import Truth, judge

if TYPE_CHECKING:
    import pandas as pd

Numbers = npt.NDArray[np.float64]
REWARDS = Plot(
    "curves", "Reward against samples", "samples", "reward", "samples a prompt", "reward, log-odds (nats)", "series"
)
TEMPERATURES = Plot(
    "curves", "Reward against temperature", "temperature", "reward", "temperature", "reward, log-odds (nats)", "series"
)
UTILITY = Plot(
    "curves", "What the judge says of the chosen", "samples", "value", "samples a prompt", "utility", "series"
)
SHARES = Plot("curves", "Shares of the chosen", "samples", "value", "samples a prompt", "share", "series")


class Mean(NamedTuple):
    """A mean over prompts with its 95% interval; None: a mean of one prompt has none."""

    prompts: int
    value: float
    low: float | None
    high: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of one value or more, with Student's interval."""
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return Mean(len(values), float(np.mean(values)), low, high)


def share_of(values: Sequence[float]) -> Mean:
    """Return a share with Wilson's interval, which is wide where all are alike; values are from 0 to 1."""
    return Mean(len(values), float(np.mean(values)), *wilson(float(np.sum(values)), len(values)))


def sizes_up_to(num_samples: int) -> list[int]:
    """Return the numbers of samples that are reported: 1, 2, 4 and so on, and all."""
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def draws_of(choice: Choice) -> list[int]:
    """Return the candidates that a prompt's samples gave, the best first, each as often as it was drawn."""
    return [number for number in choice.order for _ in range(choice.candidates[number]["draws"])]


def reward_curve(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return the mean over prompts of the greatest, the median and the mean reward, against the number of samples."""
    rewards = [[choice.rewards[number].value for number in draws_of(choice)] for choice in choices]
    rows = []
    for size in sizes_up_to(len(rewards[0])):
        weights = {
            "max": chances_of_place(len(rewards[0]), size, 0),
            "median": chances_of_middle(len(rewards[0]), size),
            "mean": np.full(len(rewards[0]), 1 / len(rewards[0])),
        }
        for statistic, own in weights.items():
            found = mean_of([float(own @ np.array(each)) for each in rewards])
            rows.append({"statistic": statistic, "samples": size, "reward": found.value, **ends_of(found)})
    return rows


def best_reward(choices: Sequence[Choice]) -> float:
    """Return the mean over prompts of the best sample's reward: what the search for a temperature maximises."""
    return float(np.mean([choice.rewards[draws_of(choice)[0]].value for choice in choices]))


def ends_of(mean: Mean) -> dict[str, float | None]:
    """Return a mean's interval as columns of a table."""
    return {"low": mean.low, "high": mean.high, "prompts": mean.prompts}


def report_rewards(
    stage: Stage[Any], chosen: Mapping[Kind, Sequence[Choice]], tried: Mapping[Kind, Mapping[float, Sequence[Choice]]]
) -> dict[str, float]:
    """Plot rewards against the number of samples, and against the temperatures that were tried; return figures."""
    import pandas

    figures: dict[str, float] = {}
    against_samples, against_temperature = [], []
    for kind in (kind for kind in KINDS if chosen[kind]):
        curve = reward_curve(chosen[kind])
        against_samples += [{"series": f"{kind}: {row['statistic']}", "kind": kind, **row} for row in curve]
        figures |= {f"{kind}/reward/{row['statistic']}": row["reward"] for row in curve[-3:]}
        for temperature, choices in sorted(tried[kind].items()):
            against_temperature += [
                {"series": f"{kind}: {row['statistic']}", "kind": kind, "temperature": temperature, **row}
                for row in reward_curve(choices)[-3:]
            ]
    if against_samples:
        write(stage, "rewards", pandas.DataFrame(against_samples), REWARDS)
        write(stage, "temperatures", pandas.DataFrame(against_temperature), TEMPERATURES)
    return figures


# --- where there is a truth ---


class Verdict(NamedTuple):
    """What the judge says of a candidate; None where it doesn't apply."""

    utility: float
    right: bool | None
    factual_right: bool | None
    violations: bool | None
    refusals: bool | None


def judged(choice: Choice, truth: Truth, annotators: Mapping[str, Annotator]) -> list[Verdict]:
    """Return the judge's verdict on each candidate; the utility is that to an average annotator who sees safety."""
    prompt = choice.prompt
    verdicts = []
    for candidate in choice.candidates:
        answer = prompt.id, candidate["text"], candidate["finished"]
        found = judge(truth, *answer)
        verdicts.append(
            Verdict(
                utility=mean_utility(truth, annotators, *answer),
                right=found.right,
                factual_right=found.right if prompt.category == "factual" else None,
                violations=not found.safe if choice.kind == "safety" else None,
                refusals=found.refuses if choice.kind == "helpfulness" else None,
            )
        )
    return verdicts


class Against(NamedTuple):
    """A figure of the judge, of each prompt's draws in the order of their rewards, and of its random pick."""

    draws: list[Numbers]
    random: list[float]
    best: list[float]

    def at(self, size: int) -> list[float]:
        """Return each prompt's mean figure of the best of `size` samples."""
        return [float(chances_of_place(len(own), size, 0) @ own) for own in self.draws]


def against_chance(choices: Sequence[Choice], verdicts: Sequence[Sequence[Verdict]], figure: str) -> Against:
    """Return a figure of all prompts to which it applies."""
    found = Against([], [], [])
    for choice, own in zip(choices, verdicts, strict=True):
        values = [getattr(verdict, figure) for verdict in own]
        if values[0] is not None:
            found.draws.append(np.array([values[number] for number in draws_of(choice)], dtype=np.float64))
            found.random.append(float(values[choice.random]))
            found.best.append(float(values[choice.best]))
    return found


def report_truth(
    stage: Stage[Any], chosen: Mapping[Kind, Sequence[Choice]], truth: Truth, annotators: Mapping[str, Annotator]
) -> dict[str, float]:
    """Plot what the judge says of the best of N samples, beside random picks; return figures of what is chosen."""
    import pandas

    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for kind in (kind for kind in KINDS if chosen[kind]):
        verdicts = [judged(choice, truth, annotators) for choice in chosen[kind]]
        for figure in Verdict._fields:
            found = against_chance(chosen[kind], verdicts, figure)
            if not found.draws:
                continue
            average = mean_of if figure == "utility" else share_of
            curve = [(size, average(found.at(size))) for size in sizes_up_to(len(found.draws[0]))]
            rows += _rows(kind, figure, "chosen", curve)
            rows += _rows(kind, figure, "random", [(size, average(found.random)) for size, _ in curve])
            name = f"{kind}/judge/{figure}"
            gains = [best - random for best, random in zip(found.best, found.random, strict=True)]
            figures |= _figures(name, average(found.best))
            figures |= _figures(f"{name}/random", average(found.random))
            figures |= _figures(f"{name}/gain", mean_of(gains))
            if figure == "utility":  # fewer samples than K: the reward is over-optimised from there on
                figures[f"{name}/most_at"] = max(curve, key=lambda point: (point[1].value, -point[0]))[0]
    if rows:
        table = pandas.DataFrame(rows)
        is_utility = table["figure"] == "utility"
        write(stage, "judge_utility", table[is_utility], UTILITY)
        write(stage, "judge_shares", table[~is_utility], SHARES)
    return figures


def _rows(kind: Kind, figure: str, way: str, curve: Iterable[tuple[int, Mean]]) -> list[dict[str, Any]]:
    series = f"{kind}: {figure.replace('_', ' ')}, {way}"
    about = {"series": series, "kind": kind, "figure": figure, "way": way}
    return [{**about, "samples": size, "value": mean.value, **ends_of(mean)} for size, mean in curve]


def _figures(name: str, mean: Mean) -> dict[str, float]:
    figures = {name: mean.value}
    if mean.low is not None and mean.high is not None:
        figures |= {f"{name}/low": mean.low, f"{name}/high": mean.high}
    return figures


def write(stage: Stage[Any], name: str, table: pd.DataFrame, plot: Plot) -> None:
    """Write a table as a plot, and for MLflow."""
    stage.plot(name, table, plot)
    table.to_csv(stage.tables / f"{name}.csv", index=False)


# --- counts ---


def count_figures(kind: Kind, choices: Sequence[Choice], scales: Scales) -> dict[str, float]:
    """Return what was drawn for a kind's prompts: of the answered ones counts, of all their samples shares."""
    answered = [choice for choice in choices if choice.is_answered]
    samples = [choice.candidates[number] for choice in choices for number in draws_of(choice)]
    unsafe = [scales.safety.probability(each["safety"]) < scales.threshold for each in samples]
    return {
        f"{kind}/answered": len(answered),
        f"{kind}/unanswered": len(choices) - len(answered),
        f"{kind}/identical": sum(len(set(draws_of(choice))) == 1 for choice in answered),
        f"{kind}/earlier_best": sum(choice.candidates[choice.best]["draws"] == 0 for choice in answered),
        f"{kind}/same_as_random": sum(choice.best == choice.random for choice in answered),
        f"{kind}/two_branches": sum(len({each.branch for each in choice.rewards}) > 1 for choice in answered),
        f"{kind}/samples": len(samples),
        f"{kind}/finished": sum(each["finished"] for each in samples) / len(samples),
        f"{kind}/empty": sum(not each["text"] for each in samples) / len(samples),
        f"{kind}/answer_tokens": sum(each["num_tokens"] for each in samples) / len(samples),
        f"{kind}/called_unsafe": sum(unsafe) / len(samples),
    }
