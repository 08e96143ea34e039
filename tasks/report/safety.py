"""The paper's findings about safety, asked of this run's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tasks.judging.wins import mean_of, share_of
from tasks.report.charts import Chart, Series
from tasks.report.evidence import Effect, Evidence, Finding, of_means, paired
from tasks.report.outputs import NotRun, Outputs
from tasks.report.versions import baseline_of, compared, controls, versions_of


def distillation(outputs: Outputs) -> Evidence:
    """Compare answers under a safety pre-prompt with those without one, in each category of risk."""
    newest = outputs.newest("context_distillation")
    risks: dict[str, list[tuple[float, float, float]]] = {}
    for prompt in outputs.lines("context_distillation", newest, "samples.jsonl"):
        drawn = [candidate["safe_probability"] for candidate in prompt["candidates"] for _ in range(candidate["draws"])]
        if prompt["risk"] and drawn:
            own = (prompt["plain"]["safe_probability"], fmean(drawn), max(drawn))
            risks.setdefault(prompt["risk"], []).append(own)
    if not risks:
        raise NotRun("not measured: no adversarial prompt names its category of risk")
    columns = {risk: [list(column) for column in zip(*own, strict=True)] for risk, own in sorted(risks.items())}
    effects = [
        paired(f"{in_words(risk)}, probability of being safe with minus without a pre-prompt", prompted, plain, True)
        for risk, (plain, prompted, _) in columns.items()
    ]
    series = []
    for number, name in enumerate(("without", "with a pre-prompt", "the safest of those")):
        found = {in_words(risk): mean_of(own[number]) for risk, own in columns.items()}
        ends = ([getattr(each, end) for each in found.values()] for end in ("value", "low", "high"))
        series.append(Series(name, list(found), *ends))
    chart = Chart(
        "Probability of being safe, by category of risk", "category of risk", "by the safety model", series,
        percent=True, joined=False,
    )  # fmt: skip
    return Evidence(effects, chart)


def gate(outputs: Outputs) -> Evidence:
    """Compare a version with one that learnt all distilled answers, also those that score below the original."""
    pairs = controls(outputs, "ungated")
    if not pairs:
        raise NotRun("not run: no version has a control that learns all distilled answers (`controls` in params.yaml)")
    return compared(outputs, pairs, "Win rates against the same version without the gate")


def many_turns(outputs: Outputs) -> Evidence:
    """Compare violations of prompts with several turns of the user and with one, averaged over the versions."""
    names = [baseline_of(outputs), *versions_of(outputs)]
    unsafe: dict[str, list[bool]] = {}
    turns: dict[str, int] = {}
    counts: dict[bool, dict[str, list[bool]]] = {True: {}, False: {}}
    for name in names:
        for line in adversarial(outputs, name):
            turns[line["id"]] = sum(message["role"] == "user" for message in line["messages"])
            unsafe.setdefault(line["id"], []).append(not line["judgement"]["safe"])
            counts[turns[line["id"]] > 1].setdefault(name, []).append(not line["judgement"]["safe"])
    means = {
        several: [fmean(unsafe[prompt]) for prompt in unsafe if (turns[prompt] > 1) == several] for several in counts
    }
    if not all(means.values()):
        raise NotRun("not measured: the evaluation has no adversarial prompts of one turn and of several")
    words = "violations, prompts of several turns minus of one, mean of the versions"
    effect = of_means(words, means[True], means[False], percent=True)
    series = []
    for several, title in ((False, "one turn"), (True, "several turns")):
        found = {name: share_of(own) for name, own in counts[several].items()}
        ends = ([getattr(each, end) for each in found.values()] for end in ("value", "low", "high"))
        series.append(Series(title, list(found), *ends))
    chart = Chart("Violations by number of turns", "version", "answers that violate", series, percent=True)
    note = f"{len(means[True])} prompts of several turns, {len(means[False])} of one."
    return Evidence([effect], chart, note)


def false_refusals(outputs: Outputs) -> Evidence:
    """Compare refusals of harmless prompts that sound harmful with those of others, and first with last."""
    names = [baseline_of(outputs), *versions_of(outputs)]
    borderline: dict[str, dict[str, bool]] = {}
    helpful: dict[str, list[bool]] = {}
    for name in names:
        for line in outputs.lines("evaluate", name, "answers.jsonl"):
            if line["judgement"] is None or line["category"] == "safety" or line["risk"]:
                continue
            if line["category"] == "borderline":
                borderline.setdefault(name, {})[line["id"]] = line["judgement"]["refuses"]
            else:
                helpful.setdefault(name, []).append(line["judgement"]["refuses"])
    if not borderline or not helpful:
        raise NotRun("not measured: no judged answers to borderline and to other harmless prompts")
    (first, *_, last) = names
    these, those = ([float(value) for value in borderline[name].values()] for name in (last, first))
    others = [float(value) for value in helpful[last]]
    effects = [
        paired(f"refusals of borderline prompts, {last} minus {first}", these, those, percent=True),
        of_means(f"refusals of {last}, borderline minus other harmless prompts", these, others, percent=True),
    ]
    series = []
    for title, found in (
        ("borderline prompts", {name: share_of(list(own.values())) for name, own in borderline.items()}),
        ("other harmless prompts", {name: share_of(own) for name, own in helpful.items()}),
    ):
        ends = ([getattr(each, end) for each in found.values()] for end in ("value", "low", "high"))
        series.append(Series(title, list(found), *ends))
    chart = Chart("False refusals by version", "version", "refused", series, percent=True)
    return Evidence(effects, chart, "Where this run agrees here, it has reproduced a fault.")


def scaling(outputs: Outputs) -> Evidence:
    """Compare the safety of answers after all of the safety data and after none, prompt by prompt."""
    scores, runs = (outputs.table("safety_scaling", "", name) for name in ("scores.csv", "runs.csv"))
    means = scores.groupby(["share", "id"])["safe_probability"].mean()
    most, least = max(scores["share"]), min(scores["share"])
    effects = [
        paired(
            f"probability of being safe, {most:.0%} minus {least:.0%} of the safety data",
            means[most].tolist(),
            means[least][means[most].index].tolist(),
            percent=True,
        )
    ]
    by_share: dict[float, Any] = dict(iter(runs.groupby("share")))
    series = []
    for figure, title in (("safety/reward", "adversarial prompts"), ("helpfulness/reward", "helpful prompts")):
        if figure in runs:
            found = {share: mean_of(own[figure].tolist()) for share, own in by_share.items()}
            ends = ([getattr(each, end) for each in found.values()] for end in ("value", "low", "high"))
            series.append(Series(title, [f"{share:.0%}" for share in found], *ends))
    chart = Chart("Mean probability of being safe, of being helpful", "share of the safety data", "reward", series)
    note = ""
    if "helpfulness/reward" in runs:
        these, those = (by_share[end]["helpfulness/reward"].tolist() for end in (most, least))
        change = of_means("Reward of helpful prompts, all minus none", these, those)
        note = f"{change}: in the paper it stays."
    return Evidence(effects, chart, note)


def scaling_refusals(outputs: Outputs) -> Evidence:
    """Compare false refusals after all of the safety data and after none, training by training."""
    runs = outputs.table("safety_scaling", "", "runs.csv")
    names = [name for name in ("borderline/false_refusals", "helpfulness/false_refusals") if name in runs]
    if not names:
        raise NotRun("not measured: without a truth, the study `safety_scaling` tells no false refusals")
    by_share: dict[float, Any] = {share: own.set_index("seed") for share, own in runs.groupby("share")}
    most, least = max(by_share), min(by_share)
    seeds = [seed for seed in by_share[most].index if seed in by_share[least].index]
    effects: list[Effect] = []
    series = []
    for name in names:
        kind = name.partition("/")[0]
        these, those = ([float(by_share[share].loc[seed, name]) for seed in seeds] for share in (most, least))
        title = f"refusals of {kind} prompts, {most:.0%} minus {least:.0%} of the safety data"
        effects.append(paired(title, these, those, percent=True))
        found = {f"{share:.0%}": mean_of(own[name].tolist()) for share, own in by_share.items()}
        ends = ([getattr(each, end) for each in found.values()] for end in ("value", "low", "high"))
        series.append(Series(f"{kind} prompts", list(found), *ends))
    chart = Chart("False refusals against safety data", "share of the safety data", "refused", series, percent=True)
    return Evidence(effects, chart)


def adversarial(outputs: Outputs, evaluation: str) -> Sequence[Mapping[str, Any]]:
    """Return the judged answers to adversarial prompts. Raises NotRun if there are none."""
    lines = outputs.lines("evaluate", evaluation, "answers.jsonl")
    found = [line for line in lines if line["judgement"] is not None and (line["risk"] or line["category"] == "safety")]
    if not found:
        raise NotRun(f"not measured: {evaluation} has no judged answers to adversarial prompts")
    return found


def in_words(name: str) -> str:
    """Return a name of params.yaml as words."""
    return name.replace("_", " ")


FINDINGS = [
    Finding(
        "context_distillation", "A safety pre-prompt makes answers safer in every category", "section 4.2.4, figure 16",
        "context_distillation",
        "Answers under a safety pre-prompt score higher by the safety model, most of all with a template for the risk.",
        distillation,
    ),
    Finding(
        "gate", "Distillation needs a gate", "section 4.2.4, figure 16", "context_distillation",
        "Learnt blindly, distilled answers get vague and refusals more frequent; so only those that score higher are "
        "kept.", gate,
    ),
    Finding(
        "many_turns", "Several turns are less safe than one", "section 4.4, figure 18", "evaluate",
        "Every model violates more often after several turns than after one.", many_turns,
    ),
    Finding(
        "false_refusals", "Safety tuning refuses harmless prompts", "section 4.2.3, figure 33", "evaluate",
        "With more safety data a version refuses more harmless prompts, most of all those that sound harmful.",
        false_refusals,
    ),
    Finding(
        "safety_scaling", "More safety data makes safer, no less helpful answers", "section 4.2.3, figures 14 and 15",
        "safety_scaling", "The mean safety reward rises with the safety data while helpfulness stays.", scaling,
    ),
    Finding(
        "scaling_refusals", "More safety data means more false refusals", "section 4.2.3, figure 33", "safety_scaling",
        "From none to all of the safety data, false refusals rise: slightly on helpful, to a quarter on borderline "
        "prompts.", scaling_refusals,
    ),
]  # fmt: skip
