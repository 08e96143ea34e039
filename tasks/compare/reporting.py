"""What the comparison writes: tables, plots, and figures for MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from tasks.compare.comparisons import FIGURES, SCALE, Comparison, Difference, Part
from tasks.compare.judges import JUDGES, JudgeName
from tasks.judging.wins import Estimate, Wins, in_words
from tasks.reading.prompts import Kind
from tasks.running.files import write_lines
from tasks.running.names import metric_name
from tasks.running.plots import Plot
from tasks.running.stage import Stage

MEASURES: Mapping[Kind, str] = {"helpfulness": "helpfulness", "safety": "harmlessness"}
BOUNDS = ("low", "high")


# --- figures ---


def comparison_figures(comparisons: Sequence[Comparison], newest: str | None, baseline: str) -> dict[str, float]:
    """Return win rates and differences as metrics; `newest/` repeats the last version's against the baseline.

    They are under `<version>/against/<opponent>/<kind>`, those of judges other than the world's one level below, in
    `annotators` and `rewards`.
    """
    figures: dict[str, float] = {}
    for found in comparisons:
        judge = "" if found.judge == "utility" else f"/{found.judge}"
        places = [f"{metric_name(found.version, 'against', found.opponent)}/{found.kind}{judge}"]
        if (found.version, found.opponent) == (newest, baseline):
            places.append(f"newest/{found.kind}{judge}")
        for place in places:
            figures |= {
                f"{place}/win_rate": found.wins.win_rate,
                f"{place}/win_rate/low": found.wins.low,
                f"{place}/win_rate/high": found.wins.high,
                f"{place}/win_rate/p_holm": found.p_holm,
            }
            figures |= bounded(f"{place}/controlled_win_rate", found.controlled)
            if found.points is not None:
                figures |= bounded(f"{place}/points", found.points)
            if found.difference is not None:
                figures |= bounded(f"{place}/utility_difference", found.difference)
            if found.agreement is not None:
                figures[f"{place}/agreement"] = found.agreement.coefficient
    return figures


def difference_figures(differences: Sequence[Difference]) -> dict[str, float]:
    """Return differences of shares as metrics, under `<version>/against/<opponent>/<figure>_difference`."""
    return {
        name: value
        for each in differences
        for name, value in bounded(
            f"{metric_name(each.version, 'against', each.opponent)}/{each.figure}_difference", each.estimate
        ).items()
    }


def bounded(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate as metrics, with its interval if it has one."""
    values = {name: estimate.value, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return {key: value for key, value in values.items() if value is not None}


# --- side by side ---


def write_comparisons(
    stage: Stage[Any],
    baseline: str,
    comparisons: Sequence[Comparison],
    parts: Sequence[Part],
    differences: Sequence[Difference],
) -> None:
    """Write the win rates, one row a comparison, those by part, the differences; plots; and a table in words."""
    rows = [flat(found) for found in comparisons]
    write_lines(stage.output / "win_rates.jsonl", rows)
    names = ["version", "opponent", "kind", "judge"]
    columns = [*names, *Wins._fields, "difference", "difference_low", "difference_high"]
    write_table(
        stage, "win_rates", rows, [*columns, *(name for name in (rows[0] if rows else {}) if name not in columns)]
    )
    by_part = [part_row(part) for part in parts]
    write_table(stage, "win_rates_by_part", by_part, [*names, "parted_by", "part", *Wins._fields, *ranged("points")])
    seven = [
        {**{name: getattr(found, name) for name in names}, "points": point - SCALE, "ratings": number}
        for found in comparisons
        for point, number in enumerate(found.seven)
    ]
    write_table(stage, "seven_points", seven, [*names, "points", "ratings"])
    of_shares = [difference_row(each) for each in differences]
    columns = ["version", "opponent", "role", "figure", "prompts", *ranged("difference"), "p_value", "p_holm"]
    write_table(stage, "differences", of_shares, columns)
    if not comparisons:
        return
    plot_progress(stage, baseline, comparisons)
    for judge in [judge for judge in JUDGES if any(found.judge == judge for found in comparisons)]:
        bars = [
            {"pair": f"{row['version']} against {row['opponent']}: {MEASURES[row['kind']]}", **row}
            for row in rows
            if row["judge"] == judge
        ]
        title = f"Versions against the baseline and their controls, by the {JUDGES[judge]}"
        plot = Plot("bars", title, "win_rate", "pair", "win rate, ties as halves", "version and opponent")
        stage.plot(f"controls_by_{judge}", pandas.DataFrame(bars), plot)
    title = "Versions against the baseline and their controls: win rates with 95% intervals, ties as halves"
    stage.show("against", pandas.DataFrame(pairs_in_words(comparisons)), title)
    rounds = [
        part for part in parts if part.opponent == baseline and part.parted_by in ("category", "turns", "gathered")
    ]
    if rounds:
        title = f"Versions against {baseline} by category, turns, and way of gathering: win rates with 95% intervals"
        stage.show("by_part", pandas.DataFrame(parts_in_words(rounds)).fillna(""), title)


def write_table(stage: Stage[Any], name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as a table of these columns, also for MLflow."""
    for directory in (stage.output, stage.tables):
        pandas.DataFrame(rows, columns=list(columns)).to_csv(directory / f"{name}.csv", index=False)


def plot_progress(stage: Stage[Any], baseline: str, comparisons: Sequence[Comparison]) -> None:
    """Plot each version's win rate against the baseline, by kind and judge."""
    progress = [
        {
            "version": found.version,
            "series": words_of(found.kind, found.judge),
            "win_rate": found.wins.win_rate,
            "low": found.wins.low,
            "high": found.wins.high,
        }
        for found in comparisons
        if found.opponent == baseline
    ]
    equal = dict.fromkeys(("win_rate", "low", "high"), 0.5)
    start = [{"version": baseline, "series": name, **equal} for name in {row["series"]: None for row in progress}]
    title = f"Win rate against {baseline}, by version and judge"
    stage.plot(
        "progress",
        pandas.DataFrame([*start, *progress]),
        Plot("steps", title, "version", "win_rate", "version", "win rate, ties as halves", "series"),
    )


def flat(found: Comparison) -> dict[str, Any]:
    """Return a comparison as a row."""
    names = {"version": found.version, "opponent": found.opponent, "kind": found.kind, "judge": found.judge}
    agreement = found.agreement._asdict() if found.agreement else dict.fromkeys(("coefficient", "low", "high"))
    return {
        **names,
        **found.wins._asdict(),
        **spread("difference", found.difference),
        "role": found.role,
        "raters": found.raters,
        **spread("points", found.points),
        "length": found.lengths[0],
        "opponent_length": found.lengths[1],
        **spread("controlled_win_rate", found.controlled),
        "p_value": found.p_value,
        "p_holm": found.p_holm,
        "agreement": agreement["coefficient"],
        "agreement_low": agreement["low"],
        "agreement_high": agreement["high"],
    }


def part_row(part: Part) -> dict[str, Any]:
    """Return a comparison on a part of the prompts as a row."""
    names = {name: getattr(part, name) for name in ("version", "opponent", "kind", "judge", "parted_by", "part")}
    return {**names, **part.wins._asdict(), **spread("points", part.points)}


def difference_row(each: Difference) -> dict[str, Any]:
    """Return a difference of shares as a row."""
    names = {name: getattr(each, name) for name in ("version", "opponent", "role", "figure", "p_value", "p_holm")}
    return {**names, "prompts": each.estimate.prompts, **spread("difference", each.estimate)}


def ranged(name: str) -> list[str]:
    """Return the columns of an estimate."""
    return [name, *(f"{name}_{bound}" for bound in BOUNDS)]


def spread(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Return an estimate's columns: its value and its interval."""
    values = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip(ranged(name), values, strict=True))


def pairs_in_words(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """Return a row for each version and opponent: the win rates by kind and judge, then the gains of utility."""
    rates: dict[tuple[str, str], dict[str, str]] = {}
    gains: dict[tuple[str, str], dict[str, str]] = {}
    for found in comparisons:
        pair = (found.version, found.opponent)
        row = rates.setdefault(pair, {"version": found.version, "against": found.opponent})
        row[words_of(found.kind, found.judge)] = in_words(rate_of(found.wins), "{:.1%}")
        further = gains.setdefault(pair, {})
        if found.difference is not None:
            further[f"gain of utility, {MEASURES[found.kind]}"] = in_words(found.difference, "{:+.2f}")
        if found.judge == "utility":
            further[f"at equal lengths, {MEASURES[found.kind]}"] = in_words(found.controlled, "{:.1%}")
            further[f"p by Holm, {MEASURES[found.kind]}"] = f"{found.p_holm:.2g}"
    return [row | gains.get(pair, {}) for pair, row in rates.items()]


def parts_in_words(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Return a row for each part of the prompts and judge: the win rates by version."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for part in parts:
        names = {"kind": MEASURES[part.kind], "by": part.parted_by, "part": part.part, "judge": JUDGES[part.judge]}
        row = rows.setdefault(tuple(names.values()), {**names, "prompts": str(part.wins.prompts)})
        row[part.version] = in_words(rate_of(part.wins), "{:.1%}")
    return list(rows.values())


def rate_of(wins: Wins) -> Estimate:
    """Return a win rate with its interval."""
    return Estimate(wins.prompts, wins.win_rate, wins.low, wins.high)


def words_of(kind: Kind, judge: JudgeName) -> str:
    """Return what is compared, and by whom, for people."""
    return f"{MEASURES[kind]}, {JUDGES[judge]}"


# --- all evaluations ---


def write_versions(stage: Stage[Any], roles: Mapping[str, str], versions: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Write the figures of all evaluations side by side: one row an evaluation; and a table in words."""
    rows: list[dict[str, Any]] = []
    words: list[dict[str, str]] = []
    for name, figures in versions.items():
        rows.append({"evaluation": name, "role": roles[name]})
        words.append(dict(rows[-1]))
        for figure, found in figures.items():
            rows[-1] |= {figure: found.value, f"{figure}/low": found.low, f"{figure}/high": found.high}
            is_share = not figure.endswith(("utility", "reward", "length", "rating"))
            words[-1][FIGURES[figure]] = in_words(found, "{:.1%}" if is_share else "{:.2f}")
    write_lines(stage.output / "versions.jsonl", rows)
    for directory in (stage.output, stage.tables):
        pandas.DataFrame(rows).to_csv(directory / "versions.csv", index=False)
    stage.show("evaluations", pandas.DataFrame(words).fillna(""), "All evaluations side by side, with 95% intervals")
