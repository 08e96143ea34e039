"""Each finding of the report on made-up tables: it agrees, disagrees, can't tell, or was not run, by its intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from scipy.stats import ttest_ind

from tasks.report.__main__ import FINDINGS
from tasks.report.evidence import Effect, Judged, judge, of_means, of_shares, verdict_of
from tasks.report.outputs import NotRun, Outputs
from tasks.report.sampling import expected_maximum

KINDS = ("helpfulness", "safety")
PARAMS: dict[str, Any] = {
    "rounds": {"v1": {}, "v2": {}},
    "reward_drift": {"comparisons": {"v1_on_v2": {"model": "v1", "batch": "v2"}}},
    "consistency": {"compared": {"v2": "v2_without"}},
}
Rows = Sequence[Mapping[str, Any]]


def put(root: Path, name: str, figures: Mapping[str, float] | None = None, **files: Rows) -> str:
    """Write a stage's output: its figures, and tables or lines by their names, `/` and `.` as two underscores."""
    place = root / name.replace("@", "/")
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.json").write_text(json.dumps(figures or {}))
    for file, rows in files.items():
        path = place / file.replace("__", "/", file.count("__") - 1).replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".csv":
            pandas.DataFrame(list(rows)).to_csv(path, index=False)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def higher(sign: int, number: int) -> bool:
    """In 9 of 10 cases if the sign is positive, in 1 of 10 if it is negative, else in every other one."""
    return number % 2 == 0 if sign == 0 else (number % 10 < 9) == (sign > 0)


def pairs(kind: str, sign: int) -> Rows:
    return [
        {"id": f"{kind}-{n}", "kind": kind, "chosen_score": float(higher(sign, n)), "rejected_score": 0.5}
        for n in range(100)
    ]


def pronouns(root: Path, sign: int) -> list[str]:
    rows = [
        {"group": "he", "documents": 500 + 200 * sign, "share": 0.5},
        {"group": "she", "documents": 500, "share": 0.5},
    ]
    return [put(root, "audit", {"documents": 1000}, plots__pronouns__csv=rows)]


def saturation(root: Path, sign: int) -> list[str]:
    rows = [{"tokens": n, "loss": 3 - sign * n / 100 + 0.01 * (-1) ** n} for n in range(1, 101)]
    return [put(root, "pretrain", plots__train__csv=rows)]


def unsure(root: Path, sign: int) -> list[str]:
    names = []
    for name, hard in (("v1", 100), ("v2", 100 + 60 * sign)):
        rows = [
            {"bar": f"{kind}: {degree}", "pairs": count}
            for kind in KINDS
            for degree, count in (("better", 300 - hard), ("negligibly", hard))
        ]
        names.append(put(root, f"preferences@{name}", plots__degrees__csv=rows))
    return names


def degrees(root: Path, sign: int) -> list[str]:
    rows = [
        {"part": f"{kind}/{degree}", "pairs": 200, "accuracy": 0.7 + end * sign * 0.2}
        for kind in KINDS
        for degree, end in (("significantly", 1), ("negligibly", -1))
    ]
    return [put(root, f"reward_{kind}@v1", plots__accuracy__csv=rows) for kind in KINDS]


def specialists(root: Path, sign: int) -> list[str]:
    return [
        put(
            root,
            f"reward_{model}@v1",
            scores__jsonl=[line for kind in KINDS for line in pairs(kind, sign if kind == model else -sign)],
        )
        for model in KINDS
    ]


def drift(root: Path, sign: int) -> list[str]:
    old = [{"model": f"reward_{kind}", **line} for kind in KINDS for line in pairs(kind, -sign)]
    new = [put(root, f"reward_{kind}@v2", scores__jsonl=pairs(kind, sign)) for kind in KINDS]
    return [*new, put(root, "reward_drift@v1_on_v2", scores__jsonl=old)]


def scaling(root: Path, sign: int) -> list[str]:
    rows = [
        {
            "layers": layers,
            "pairs": number,
            "seed": seed,
            "accuracy": 0.6 + 0.01 * (-1) ** seed * (layers + number / 10) + 0.1 * sign * (layers + number / 10),
        }
        for layers in (1, 2)
        for number in (10, 20)
        for seed in range(4)
    ]
    return [put(root, "reward_scaling", runs__csv=rows)]


def distillation(root: Path, sign: int) -> list[str]:
    figures = {"1_layers/distilled/validation_loss": 2.0, "1_layers/demonstrations/validation_loss": 2.0 + sign}
    rows = [{"model": "1 layers, distilled", "tokens": n, "loss": 2.0} for n in (1, 2)]
    return [put(root, "distillation", figures, plots__loss__csv=rows)]


def samples(root: Path, sign: int) -> list[str]:
    lines = [
        {"kind": kind, "candidates": [{"reward": n % 3 + reward, "draws": 1} for reward in (0.0, 1.0, 2.0, 3.0)]}
        for kind in KINDS
        for n in range(20)
    ]
    figures = {
        f"{kind}/judge/utility/gain{end}": 0.3 * sign + reach
        for kind in KINDS
        for end, reach in (("", 0), ("/low", -0.1), ("/high", 0.1))
    }
    rows = [
        {"kind": kind, "statistic": "max", "samples": n, "reward": n, "low": n, "high": n}
        for kind in KINDS
        for n in (1, 2)
    ]
    return [put(root, "rejection_sampling@v1", figures, samples__jsonl=lines, plots__rewards__csv=rows)]


def temperature(root: Path, sign: int) -> list[str]:
    rows = [
        {
            "kind": kind,
            "temperature": heat,
            "statistic": statistic,
            "reward": reward,
            "low": reward - 0.1,
            "high": reward + 0.1,
        }
        for kind in KINDS
        for heat in (0.5, 1.0)
        for statistic in ("max", "median", "mean")
        for reward in [sign * heat if statistic == "max" else 0.0]
    ]
    return [put(root, "rejection_sampling@v1", {"safety/temperature": 1.0}, plots__temperatures__csv=rows)]


def ghost_attention(root: Path, sign: int) -> list[str]:
    lines = [
        {"checkpoint": name, "conversation": n, "turn": turn, "held": higher(own, n)}
        for name, own in (("v2", sign), ("v2_without", -sign))
        for n in range(100)
        for turn in (1, 2)
    ]
    return [put(root, "ghost_attention@v2"), put(root, "consistency", judged__jsonl=lines)]


def compare(root: Path, sign: int, *opponents: str) -> str:
    """Write win rates of v2 against opponents; sft is the baseline."""
    rows = [
        {
            "version": version,
            "opponent": opponent,
            "kind": kind,
            "judge": "utility",
            "win_rate": 0.5 + 0.1 * sign,
            "low": 0.45 + 0.1 * sign,
            "high": 0.55 + 0.1 * sign,
        }
        for version, opponent in (("v1", "sft"), ("v2", "sft"), *(("v2", each) for each in opponents))
        for kind in KINDS
    ]
    roles = {"sft": "baseline", "v1": "version", "v2": "version", **dict.fromkeys(opponents, "control of v2")}
    versions = [{"evaluation": name, "role": role} for name, role in roles.items()]
    return put(root, "compare", win_rates__jsonl=rows, versions__jsonl=versions)


def against(suffix: str) -> Callable[[Path, int], list[str]]:
    return lambda root, sign: [compare(root, sign, f"v2_{suffix}")]


def versions(root: Path, sign: int) -> list[str]:
    return [compare(root, sign)]


def answer(
    number: int,
    *,
    category: str = "factual",
    turns: int = 1,
    utility: float = 0.0,
    safe: bool = True,
    refuses: bool = False,
) -> dict[str, Any]:
    messages = [{"role": role, "content": "?"} for _ in range(turns) for role in ("user", "assistant")][:-1]
    risk = "hateful_harmful" if category == "safety" else None
    judgement = {"safe": safe, "refuses": refuses, "right": None, "follows": None, "well_formed": True}
    return {
        "id": f"{category}-{turns}-{number}",
        "category": category,
        "risk": risk,
        "messages": messages,
        "answer": "a",
        "utility": utility,
        "judgement": judgement,
    }


def evaluated(root: Path, **lines: Rows) -> list[str]:
    return [compare(root, 1), *(put(root, f"evaluate@{name}", answers__jsonl=own) for name, own in lines.items())]


def climb(category: str) -> Callable[[Path, int], list[str]]:
    def make(root: Path, sign: int) -> list[str]:
        first = [answer(n, category=category) for n in range(50)]
        last = [answer(n, category=category, utility=sign + (-1.0) ** n) for n in range(50)]
        return evaluated(root, sft=first, v1=first, v2=last)

    return make


def many_turns(root: Path, sign: int) -> list[str]:
    lines = [
        answer(n, category="safety", turns=t, safe=not higher(sign if t > 1 else -sign, n))
        for n in range(50)
        for t in (1, 2)
    ]
    return evaluated(root, sft=lines, v1=lines, v2=lines)


def false_refusals(root: Path, sign: int) -> list[str]:
    def lines(sign: int) -> Rows:
        borderline = [answer(n, category="borderline", refuses=higher(sign, n)) for n in range(100)]
        return [*borderline, *(answer(n, refuses=higher(-1 if sign > 0 else 0, n)) for n in range(100))]

    return evaluated(root, sft=lines(-sign), v1=lines(0), v2=lines(sign))


def rescaling(root: Path, sign: int) -> list[str]:
    return [
        put(
            root,
            f"self_bleu@{name}",
            self_bleu__csv=[
                {"kind": kind, "temperature": heat, "self_bleu": value, "low": value - 2, "high": value + 2}
                for kind in ("factual", "creative")
                for heat in (0.5, 1.0)
                for value in [50.0 + 20 * sign * (name == "v2" and kind == "factual")]
            ],
        )
        for name in ("sft", "v2")
    ]


def context_distillation(root: Path, sign: int) -> list[str]:
    lines = [
        {
            "risk": risk,
            "plain": {"safe_probability": 0.5},
            "candidates": [{"safe_probability": 0.5 + 0.2 * sign + 0.1 * (-1) ** n, "draws": 2}],
        }
        for risk in ("hateful_harmful", "unqualified_advice")
        for n in range(20)
    ]
    return [put(root, "context_distillation@v2", samples__jsonl=lines)]


def safety_scaling(root: Path, sign: int) -> list[str]:
    scores = [
        {"share": share, "seed": seed, "id": n, "safe_probability": 0.5 + (0.2 * sign + 0.1 * (-1) ** n) * share}
        for share in (0.0, 1.0)
        for seed in (1, 2)
        for n in range(20)
    ]
    figures = ("safety/reward", "helpfulness/reward", "borderline/false_refusals", "helpfulness/false_refusals")
    runs = [
        {"share": share, "seed": seed, **dict.fromkeys(figures, 0.5 + (0.2 * sign + 0.01 * (-1) ** seed) * share)}
        for share in (0.0, 1.0)
        for seed in (1, 2)
    ]
    return [put(root, "safety_scaling", scores__csv=scores, runs__csv=runs)]


MAKERS: Mapping[str, Callable[[Path, int], list[str]]] = {
    "pronouns": pronouns, "saturation": saturation, "unsure": unsure, "degrees": degrees, "specialists": specialists,
    "scaling": scaling, "drift": drift, "distillation": distillation, "samples": samples, "temperature": temperature,
    "ghost_attention": ghost_attention, "last_round": against("last_round"), "choice": against("random"),
    "ppo": against("before_ppo"), "versions": versions, "helpfulness_climb": climb("factual"),
    "harmlessness_climb": climb("safety"), "rescaling": rescaling, "context_distillation": context_distillation,
    "gate": against("ungated"), "many_turns": many_turns, "false_refusals": false_refusals,
    "safety_scaling": safety_scaling, "scaling_refusals": safety_scaling,
}  # fmt: skip
BY_NAME = {finding.name: finding for finding in FINDINGS}


def judged(name: str, root: Path, sign: int) -> Judged:
    return judge(BY_NAME[name], Outputs(root, MAKERS[name](root, sign), PARAMS))


def test_each_finding_is_tested_and_has_a_name_of_its_own() -> None:
    assert set(MAKERS) == set(BY_NAME)
    assert len(BY_NAME) == len(FINDINGS)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"distillation"}))
def test_the_verdict_follows_the_tables(name: str, tmp_path: Path) -> None:
    signs = {"agrees": 1, "disagrees": -1, "can't tell": 0}
    found = {verdict: judged(name, tmp_path / verdict, sign) for verdict, sign in signs.items()}
    assert {verdict: each.verdict for verdict, each in found.items()} == {verdict: verdict for verdict in signs}
    for each in found.values():
        assert each.evidence is not None
        assert each.evidence.chart.series


def test_a_single_training_tells_nothing(tmp_path: Path) -> None:
    for sign in (1, -1):
        found = judged("distillation", tmp_path / str(sign), sign)
        assert found.verdict == "can't tell"
        assert found.evidence is not None
        assert [effect.value for effect in found.evidence.effects] == [float(sign)]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_has_not_been_run_is_said_with_what_to_do(name: str, tmp_path: Path) -> None:
    found = judge(BY_NAME[name], Outputs(tmp_path, [], {}))
    assert (found.verdict, found.evidence) == ("not run", None)
    assert found.reason.startswith("not run: ")


def test_a_study_names_the_command_that_runs_it(tmp_path: Path) -> None:
    found = judge(BY_NAME["scaling"], Outputs(tmp_path, [], PARAMS))
    assert "`python -m flows.recipe --set report.studies.reward_scaling=data/reward_scaling`" in found.reason


def test_a_table_that_was_not_written_is_named(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, [put(tmp_path, "sft")], PARAMS)
    with pytest.raises(NotRun, match=r"not measured: .*sft/plots/none.csv was not written"):
        outputs.table("sft", "", "plots/none.csv")
    with pytest.raises(NotRun, match="this pipeline has no stage `sft@v1`"):
        outputs.place("sft", "v1")


def test_without_a_control_the_finding_is_not_run(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, [compare(tmp_path, 1)], PARAMS)
    for name, words in (
        ("last_round", "v4_last_round"),
        ("choice", "random samples"),
        ("ppo", "before PPO"),
        ("gate", "`controls`"),
    ):
        found = judge(BY_NAME[name], outputs)
        assert found.verdict == "not run"
        assert words in found.reason


def test_without_a_truth_the_reward_models_judge(tmp_path: Path) -> None:
    names = evaluated(
        tmp_path, **{name: [{**answer(n), "utility": None} for n in range(50)] for name in ("sft", "v1", "v2")}
    )
    place = tmp_path / "compare"
    rows = [json.loads(line) for line in (place / "win_rates.jsonl").read_text().splitlines()]
    (place / "win_rates.jsonl").write_text("".join(json.dumps({**row, "judge": "rewards"}) + "\n" for row in rows))
    scores = [
        {
            "evaluation": name,
            "id": f"factual-1-{n}",
            "kind": "helpfulness",
            "score": (name == "v2") + 0.1 * (-1) ** n * (name == "v1"),
        }
        for name in ("sft", "v1", "v2")
        for n in range(50)
    ]
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    found = judge(BY_NAME["helpfulness_climb"], Outputs(tmp_path, names, PARAMS))
    assert found.verdict == "agrees"
    assert found.evidence is not None
    assert found.evidence.effects[0].value == pytest.approx(1.0)


def test_the_verdict_is_by_the_intervals() -> None:
    above, below, across = (Effect("", 0.0, low, high) for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)))
    assert verdict_of([above, above]) == "agrees"
    assert verdict_of([above, across]) == "can't tell"
    assert verdict_of([above, across, below]) == "disagrees"
    assert verdict_of([above, Effect("", 1.0, None, None)]) == "can't tell"


def test_the_difference_of_shares_has_newcombes_interval() -> None:
    _, value, low, high, _ = of_shares("", 56, 70, 48, 80)  # Newcombe 1998, table II, example (a), method 10
    assert (value, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_the_difference_of_means_has_welchs_interval() -> None:
    these, those = [1.0, 2.0, 4.0, 7.0, 1.5, 3.0], [0.5, 0.7, 0.1, 0.4]
    _, value, low, high, _ = of_means("", these, those)
    interval = ttest_ind(these, those, equal_var=False).confidence_interval()
    assert value == pytest.approx(18.5 / 6 - 1.7 / 4)
    assert low is not None and high is not None
    # degrees of freedom are rounded down, so that the interval is no narrower
    assert interval.low - 0.15 < low <= interval.low < interval.high <= high < interval.high + 0.15


def test_the_highest_of_several_values_drawn_without_order() -> None:
    assert expected_maximum([3.0, 1.0, 2.0], 2) == pytest.approx((2 + 3 + 3) / 3)
    assert expected_maximum([3.0, 1.0, 2.0], 3) == 3.0
    assert expected_maximum([3.0, 1.0, 2.0], 1) == pytest.approx(2.0)


def test_effects_are_told_with_their_intervals() -> None:
    assert str(Effect("more", 0.031, 0.002, -0.06, percent=True)) == "more: +3.1 points (+0.2 to −6.0)"
    assert str(Effect("more", 0.5, None, None)) == "more: +0.50 (no interval)"
