"""What the paper found, what this run's tables say of it, and the verdict: by the 95% intervals and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal, NamedTuple

from tasks.judging.intervals import student_quantile, wilson
from tasks.judging.wins import mean_of
from tasks.report.charts import Chart
from tasks.report.outputs import NotRun, Outputs

Verdict = Literal["agrees", "disagrees", "can't tell", "not run"]


class Effect(NamedTuple):
    """How large a part of a finding is in this run, with its 95% interval: above 0 it is as in the paper.

    An effect without an interval, say of a single training, decides nothing. `percent`: a difference of shares.
    """

    words: str
    value: float
    low: float | None
    high: float | None
    percent: bool = False

    def __str__(self) -> str:
        """Return the effect in words, say `longer minus shorter: +3.1 points (+0.2 to +6.0)`."""
        scale, unit = (100, " points") if self.percent else (1, "")
        digits = 1 if self.percent else 2
        value = f"{signed(self.value * scale, digits)}{unit}"
        if self.low is None or self.high is None:
            return f"{self.words}: {value} (no interval)"
        interval = f"{signed(self.low * scale, digits)} to {signed(self.high * scale, digits)}"
        return f"{self.words}: {value} ({interval})"


class Evidence(NamedTuple):
    """The effects of a finding in this run, the paper's figure from this run's data, and what a reader must know."""

    effects: Sequence[Effect]
    chart: Chart
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One finding of the paper, and how this run's tables are asked about it."""

    name: str  # its place on the page
    title: str
    where: str  # in the paper
    chapter: str  # the section of params.yaml at whose stage it is shown
    paper: str  # what the paper found, in a sentence
    look: Callable[[Outputs], Evidence]  # raises NotRun where the run has not measured it


class Judged(NamedTuple):
    """A finding, the verdict, and why: the effects and their chart, or what has not been run."""

    finding: Finding
    verdict: Verdict
    evidence: Evidence | None
    reason: str = ""


def judge(finding: Finding, outputs: Outputs) -> Judged:
    """Return what the run says of a finding."""
    try:
        evidence = finding.look(outputs)
    except NotRun as missing:
        return Judged(finding, "not run", None, str(missing))
    return Judged(finding, verdict_of(evidence.effects), evidence)


def verdict_of(effects: Sequence[Effect]) -> Verdict:
    """Return the verdict of at least one effect.

    The run agrees if all intervals are above 0, and disagrees if one is below; else it can't tell.
    """
    assert effects
    if any(effect.high is not None and effect.high < 0 for effect in effects):
        return "disagrees"
    if all(effect.low is not None and effect.low > 0 for effect in effects):
        return "agrees"
    return "can't tell"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a typographic minus if it is negative."""
    return f"{value:+.{digits}f}".replace("-", "−")


# --- effects ---


def paired(words: str, these: Sequence[float], those: Sequence[float], percent: bool = False) -> Effect:
    """Return the mean of `these` minus `those`, values of the same prompts in one order, with Student's interval.

    Raises NotRun if there is no prompt.
    """
    if not these:
        raise NotRun(f"not measured: {words} have no prompt in common")
    _, value, low, high = mean_of([this - that for this, that in zip(these, those, strict=True)])
    return Effect(words, value, low, high, percent)


def of_shares(words: str, hits: float, count: int, other_hits: float, other_count: int) -> Effect:
    """Return one share minus another of other pairs or prompts, with Newcombe's interval (1998, method 10)."""
    share, other = hits / count, other_hits / other_count
    (low, high), (other_low, other_high) = wilson(hits, count), wilson(other_hits, other_count)
    value = share - other
    below, above = math.hypot(share - low, other_high - other), math.hypot(high - share, other - other_low)
    return Effect(words, value, value - below, value + above, percent=True)


def of_means(words: str, these: Sequence[float], those: Sequence[float], percent: bool = False) -> Effect:
    """Return the mean of `these` minus that of `those`, other prompts, with Welch's interval; none for one value."""
    value = fmean(these) - fmean(those)
    if min(len(these), len(those)) < 2:
        return Effect(words, value, None, None, percent)
    spreads = [variance(values) / len(values) for values in (these, those)]
    if sum(spreads) == 0:
        return Effect(words, value, value, value, percent)
    freedom = sum(spreads) ** 2 / sum(
        spread**2 / (len(values) - 1) for spread, values in zip(spreads, (these, those), strict=True)
    )
    reach = student_quantile(max(1, math.floor(freedom))) * math.sqrt(sum(spreads))
    return Effect(words, value, value - reach, value + reach, percent)
