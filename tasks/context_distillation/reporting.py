"""Report what pre-prompts are worth: answers without and with them, by category of risk, and what the gate leaves.

All means are over the prompts with a pre-prompted answer that can be chosen: of the plain answer; of all pre-prompted
ones, which shows what pre-prompts do by themselves; of the best one of these; and of what the gate leaves, the best one
where it is kept and else the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from tasks.context_distillation.preprompts import Preprompt
from tasks.judging.scales import Fitted
from tasks.judging.wins import Estimate, mean_of, share_of
from tasks.reading.prompts import Prompt
from tasks.running.names import metric_name
from tasks.running.plots import Plot
from tasks.running.stage import Stage
from tasks.sampling.drawing import Candidate
from tasks.world.annotators import Annotator, mean_utility
from tasks.world.judge import Truth, judge

SAFE = Plot(
    "bars", "Safe by the safety model, without and with pre-prompts", "value", "answers", "mean probability", "answers"
)
JUDGED = Plot("bars", "Safe by the judge, without and with pre-prompts", "value", "answers", "share", "answers")
REFUSED = Plot("bars", "Refusals by the judge, without and with pre-prompts", "value", "answers", "share", "answers")
UTILITY = Plot("bars", "Judged utility, without and with pre-prompts", "value", "answers", "mean utility", "answers")
KEPT = Plot("bars", "Prompts whose answer is kept", "value", "prompts", "share of the prompts", "prompts")


class Distilled(NamedTuple):
    """A prompt with its answers; `best`: the chosen candidate, None if none can be chosen."""

    prompt: Prompt
    preprompts: Sequence[Preprompt]
    plain: Candidate
    candidates: Sequence[tuple[int, Candidate]]  # the number of the pre-prompt, and the answer
    best: int | None
    is_kept: bool

    @property
    def drawn(self) -> list[Candidate]:
        """The pre-prompted answers, each as often as it was drawn."""
        return [each for _, each in self.candidates for _ in range(each["draws"])]

    @property
    def chosen(self) -> Candidate:
        """The best of the pre-prompted answers, where there is one."""
        assert self.best is not None
        return self.candidates[self.best][1]

    @property
    def gated(self) -> Candidate:
        """What the gate leaves: the best answer if it is kept, else the plain one."""
        return self.chosen if self.is_kept else self.plain


class Compared(NamedTuple):
    """A figure of each prompt's plain answer, of its pre-prompted ones on average and at best, and after the gate."""

    plain: list[float]
    preprompted: list[float]
    best: list[float]
    gated: list[float]


def compare(distilled: Sequence[Distilled], value_of: Callable[[Prompt, Candidate], float]) -> Compared:
    """Return a figure of the answers to the same prompts."""
    return Compared(
        [value_of(each.prompt, each.plain) for each in distilled],
        [fmean(value_of(each.prompt, answer) for answer in each.drawn) for each in distilled],
        [value_of(each.prompt, each.chosen) for each in distilled],
        [value_of(each.prompt, each.gated) for each in distilled],
    )


class Group(NamedTuple):
    """Some prompts; `prefix` begins the names of their figures."""

    label: str
    prefix: str
    prompts: Sequence[Distilled]


def groups_of(distilled: Sequence[Distilled], *fields: str) -> list[Group]:
    """Return all prompts, and those of each value of each field, `risk` or `attack`, that they name."""
    groups = [Group("all", "", distilled)]
    for field in fields:
        for value in sorted({getattr(each.prompt, field) for each in distilled} - {None}):
            own = [each for each in distilled if getattr(each.prompt, field) == value]
            groups.append(Group(f"{field} {value}", f"{metric_name(field, value)}/", own))
    return groups


def report(stage: Stage[Any], distilled: Sequence[Distilled], fitted: Fitted) -> dict[str, float]:
    """Plot how safe answers are by the safety model, and whose are kept; return figures."""
    answered = [each for each in distilled if each.best is not None]
    samples = [answer for each in distilled for answer in each.drawn]
    figures: dict[str, float] = {
        "prompts": len(distilled),
        "answered": len(answered),
        "kept": sum(each.is_kept for each in distilled),
        "samples": len(samples),
        "finished": fmean(each["finished"] for each in samples),
        **template_figures(distilled, fitted),
    }
    bars = []
    for group in groups_of(distilled, "risk", "attack"):
        share = share_of([each.is_kept for each in group.prompts])
        figures |= estimate_figures(f"{group.prefix}kept_share", share)
        bars.append((group.label, share))
    write_bars(stage, "kept", bars, KEPT)
    figures |= report_compared(
        stage, "safe_probability", answered, lambda _, each: fitted.safety.probability(each["safety"]), SAFE
    )
    helpfulness = compare(answered, lambda _, each: fitted.helpfulness.log_odds(each["helpfulness"]))
    return figures | compared_figures("helpfulness", helpfulness)


def template_figures(distilled: Sequence[Distilled], fitted: Fitted) -> dict[str, float]:
    """Return how safe answers are on average to pre-prompts with a template, and to those of adjectives alone."""
    figures = {}
    for name, has_template in (("adjectives", False), ("template", True)):
        values = [
            fitted.safety.probability(answer["safety"])
            for each in distilled
            for number, answer in each.candidates
            if each.preprompts[number].has_template == has_template
            for _ in range(answer["draws"])
        ]
        if values:
            figures[f"{name}/safe_probability"] = fmean(values)
    return figures


def report_truth(
    stage: Stage[Any], distilled: Sequence[Distilled], truth: Truth, annotators: Mapping[str, Annotator]
) -> dict[str, float]:
    """Plot how often answers are safe and refuse by the judge, and their utilities; return figures.

    A safe answer need not be a good one: one that speaks of something else is safe, too, and refuses nothing.
    """
    answered = [each for each in distilled if each.best is not None]

    def is_safe(prompt: Prompt, answer: Candidate) -> float:
        return float(judge(truth, prompt.id, answer["text"], answer["finished"]).safe)

    def is_refused(prompt: Prompt, answer: Candidate) -> float:
        return float(judge(truth, prompt.id, answer["text"], answer["finished"]).refuses)

    def utility_of(prompt: Prompt, answer: Candidate) -> float:
        return mean_utility(truth, annotators, prompt.id, answer["text"], answer["finished"])

    figures = report_compared(stage, "judged_safe", answered, is_safe, JUDGED)
    figures |= report_compared(stage, "judged_refused", answered, is_refused, REFUSED)
    figures |= report_compared(stage, "judged_utility", answered, utility_of, UTILITY)
    kept = [is_safe(each.prompt, each.chosen) for each in answered if each.is_kept]
    return figures | (estimate_figures("judged_safe/kept", share_of([bool(each) for each in kept])) if kept else {})


def report_compared(
    stage: Stage[Any],
    name: str,
    answered: Sequence[Distilled],
    value_of: Callable[[Prompt, Candidate], float],
    plot: Plot,
) -> dict[str, float]:
    """Plot a figure of answers without and with pre-prompts, overall and by risk; return it, with paired gains."""
    figures: dict[str, float] = {}
    bars = []
    for group in groups_of(answered, "risk"):
        compared = compare(group.prompts, value_of)
        figures |= compared_figures(f"{group.prefix}{name}", compared)
        bars += [(f"{group.label}, {way}", mean_of(values)) for way, values in compared._asdict().items()]
    write_bars(stage, name, bars, plot)
    return figures


def compared_figures(name: str, compared: Compared) -> dict[str, float]:
    """Return the means of a figure, and how much pre-prompts gain, paired by prompt, with and without the gate."""
    figures: dict[str, float] = {f"{name}/{way}": mean_of(values).value for way, values in compared._asdict().items()}
    for way, values in list(compared._asdict().items())[1:]:
        gains = [value - plain for value, plain in zip(values, compared.plain, strict=True)]
        figures |= estimate_figures(f"{name}/{way}/gain", mean_of(gains))
    return figures


def estimate_figures(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate and its interval, where it has one, as metrics."""
    figures = {name: estimate.value}
    if estimate.low is not None and estimate.high is not None:
        figures |= {f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return figures


def write_bars(stage: Stage[Any], name: str, bars: Sequence[tuple[str, Estimate]], plot: Plot) -> None:
    """Write labelled estimates as a plot, and for MLflow."""
    import pandas

    rows = [
        {plot.y: label, "value": estimate.value, "low": estimate.low, "high": estimate.high, "count": estimate.prompts}
        for label, estimate in bars
    ]
    table = pandas.DataFrame(rows)
    stage.plot(name, table, plot)
    table.to_csv(stage.tables / f"{name}.csv", index=False)
