"""Write one page that tells what came of this run, for a browser without server or network, and what `dvc` shows of it.

On top stands the answer: which version is best, whether it is promoted, and why. Then whether the run finds what the
paper found (evidence.py; the findings are in corpus.py, rewards.py, sampling.py, versions.py and safety.py), what all
versions answer to the same prompts, and the stages in the graph's order, with their tables folded.

Covers the stages that this one waits for in the current dvc.yaml: those of a removed round are left out, even if their
files still exist. Reads their metrics.json, what `stage.plot` and `stage.show` wrote into their plots/ and tables/, and
for the findings other tables and lines. Writes

- index.html                     the page
- findings.json                  each finding, its verdict, and the effects with their 95% intervals
- metrics/<place>.json           the figures that dvc.yaml's `meta: figures` names; for `dvc metrics`
- plots/<kind>/<place>/NAME.csv  title, x, y, series; for `dvc plots`, whose templates are .dvc/plots/<kind>.json

A change to a plot's declaration in a stage's code shows once that stage has run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from tasks.report import corpus, rewards, safety, sampling, versions
from tasks.report.answer import answer_of, samples_of
from tasks.report.chapters import CHAPTERS, Drawn, charts_of, said_of, side_by_side, tables_of
from tasks.report.charts import Chart, draw
from tasks.report.evidence import Finding, Judged, Verdict, judge
from tasks.report.outputs import Outputs
from tasks.running.files import read_json, write_json
from tasks.running.params import Section, read_params
from tasks.running.places import DATA, place_of, section_of
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start

FINDINGS: Sequence[Finding] = [
    *corpus.FINDINGS, *rewards.FINDINGS, *sampling.FINDINGS, *versions.FINDINGS, *safety.FINDINGS,
]  # fmt: skip
MARKS: Mapping[Verdict, str] = {"agrees": "✓", "disagrees": "✗", "can't tell": "?", "not run": "–"}
SAYS: Mapping[Verdict, str] = {
    "agrees": "agrees:",
    "disagrees": "disagrees:",
    "can't tell": "can't tell: an interval includes no effect.",
    "not run": "says nothing of it.",
}


class Params(Section):
    """Parameters of `report`."""

    chart_width: float = Field(gt=1, description="width of a chart, inches")
    chart_height: float = Field(gt=1, description="height of a chart, inches")
    max_points: int = Field(gt=1, description="maximum bars of a chart; with more, there is only a table")
    max_rows: int = Field(gt=1, description="maximum rows of a table; the CSV file has all")
    samples_per_category: int = Field(ge=0, description="prompts of each category that are shown with their answers")
    studies: dict[str, str] = Field(description="output of each study; data/seeds/none: not run, not shown")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Write the page, and the figures and plots for DVC."""
    waited = stages_before(stage.name)
    chosen = {name: own for name, own in waited.items() if (DATA / place_of(name) / "metrics.json").exists()}
    outputs = Outputs(DATA, list(chosen), read_params())
    plots = {name: list(read_plots(DATA / place_of(name) / "plots")) for name in chosen}
    for name in chosen:
        write_for_dvc(stage.output, place_of(name), outputs, chosen[name], plots[name])
    judged = [judge(finding, outputs) for finding in FINDINGS]
    write_json(stage.output / "findings.json", [record_of(each) for each in judged])
    page = write_page(stage, outputs, plots, judged)
    (stage.output / "index.html").write_text(page, encoding="utf-8")
    (stage.artifacts / "report.html").write_text(page, encoding="utf-8")
    counts = {verdict: sum(each.verdict == verdict for each in judged) for verdict in get_args(Verdict)}
    return {
        "stages": len(chosen),
        "plots": sum(map(len, plots.values())),
        **{f"findings/{verdict.replace(' ', '_').replace(chr(39), '')}": count for verdict, count in counts.items()},
    }


def stages_before(name: str) -> dict[str, list[str]]:
    """Return the stages that a stage waits for, each with the figures named in its `meta`.

    Those of a section stand together. Sections are in the graph's order; those that wait for each other from round to
    round, and those that don't wait for each other at all, are in the order of dvc.yaml.
    """
    import networkx
    from dvc.repo import Repo

    index = Repo().index
    (last,) = [stage for stage in index.stages if stage.addressing == name]
    needed = networkx.descendants(index.graph, last)
    stages = {
        stage.addressing.rpartition(":")[2]: stage  # a study's address begins with its dvc.yaml
        for stage in index.stages
        if stage in needed and not stage.is_data_source
    }
    sections = networkx.DiGraph()
    sections.add_nodes_from(section_of(each) for each in stages)
    names = {stage: each for each, stage in stages.items()}
    for stage, other in index.graph.edges:
        if stage in names and other in names:
            sections.add_edge(section_of(names[other]), section_of(names[stage]))
    written = list(dict.fromkeys(section_of(each) for each in stages))
    circles = networkx.condensation(sections)
    first = {circle: min(map(written.index, members)) for circle, members in circles.nodes(data="members")}
    order = [
        section
        for circle in networkx.lexicographical_topological_sort(circles, key=first.__getitem__)
        for section in sorted(circles.nodes[circle]["members"], key=written.index)
    ]
    return {
        each: list((stages[each].meta or {}).get("figures", []))
        for section in order
        for each in stages
        if section_of(each) == section
    }


def read_plots(directory: Path) -> Iterator[Drawn]:
    """Yield name, declaration and points of each plot that `stage.plot` wrote; points: columns title, x, y, series.

    A table without rows is skipped: it has nothing to plot.
    """
    import pandas as pd

    for path in sorted(directory.glob("*.json")):
        plot = Plot(**json.loads(path.read_text(encoding="utf-8")))
        words = {name for name in (plot.series, {"bars": plot.y, "steps": plot.x}.get(plot.kind)) if name is not None}
        table = pd.read_csv(
            path.with_suffix(".csv"),
            dtype=dict.fromkeys(words, str),
            keep_default_na=False,  # a word in the data may be `None` or `NA`
            na_values={name: [""] for name in {plot.x, plot.y} - words},
        )
        against = plot.x_label if plot.kind == "bars" else f"{plot.y_label} against {plot.x_label}"
        points = {"title": f"{plot.title} ({against})", "x": table[plot.x], "y": table[plot.y]}
        if len(table):
            yield path.stem, plot, pd.DataFrame({**points, "series": table[plot.series] if plot.series else plot.y})


def read_tables(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield `title`, `columns` and `rows`, all as text, of each table that `stage.show` wrote."""
    import pandas as pd

    for path in sorted(directory.glob("*.json")):
        table = pd.read_csv(path.with_suffix(".csv"), dtype=str, keep_default_na=False)
        title = read_json(path)["title"]
        yield {"title": title, "columns": list(table.columns), "rows": table.to_numpy().tolist()}


def write_for_dvc(output: Path, place: Path, outputs: Outputs, chosen: Sequence[str], plots: Sequence[Drawn]) -> None:
    """Write the chosen figures of a stage, and the points of its plots."""
    figures = outputs.figures(*place.parts)
    write_json(output / "metrics" / f"{place}.json", {name: figures[name] for name in chosen if name in figures})
    for name, plot, points in plots:
        path = output / "plots" / plot.kind / place / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        points.to_csv(path, index=False)


def record_of(judged: Judged) -> dict[str, Any]:
    """Return a finding's verdict and effects, for programs."""
    effects = [effect._asdict() for effect in judged.evidence.effects] if judged.evidence else []
    return {"name": judged.finding.name, "verdict": judged.verdict, "effects": effects, "reason": judged.reason}


# --- the page ---


def write_page(
    stage: Stage[Params], outputs: Outputs, plots: Mapping[str, Sequence[Drawn]], judged: Sequence[Judged]
) -> str:
    """Return the page."""
    params = stage.params
    drawn = partial(draw, path=stage.scratch / "chart.svg", size=(params.chart_width, params.chart_height))
    answer = answer_of(outputs)
    findings = [
        {**each._asdict(), "svg": drawn(each.evidence.chart, name=each.finding.name) if each.evidence else ""}
        for each in judged
    ]
    sections = list(dict.fromkeys(map(section_of, outputs.stages)))
    chapters = [chapter_of(name, outputs, plots, findings, params, drawn) for name in sections]
    # a finding without its stage is told where the missing stages are
    elsewhere = [each for each in findings if each["finding"].chapter not in sections]
    missing = [(chapter.title, name) for name, chapter in CHAPTERS.items() if name not in sections]
    return render(
        answer=answer,
        pictures=[drawn(chart, name=f"answer-{number}") for number, chart in enumerate(answer.charts)],
        findings=findings,
        counts={verdict: sum(each.verdict == verdict for each in judged) for verdict in get_args(Verdict)},
        samples=samples_of(outputs, params.samples_per_category, stage.seed),
        chapters=chapters,
        missing=missing,
        elsewhere=elsewhere,
    )


def chapter_of(
    name: str,
    outputs: Outputs,
    plots: Mapping[str, Sequence[Drawn]],
    findings: Sequence[Mapping[str, Any]],
    params: Params,
    drawn: Any,
) -> dict[str, Any]:
    """Return a section's chapter, as `render` takes it.

    Of a stage of the recipe, the plots named in CHAPTERS are drawn, of any other stage all that say something.
    """
    known, entries = CHAPTERS.get(name), outputs.entries(name)
    stages = {entry: f"{name}@{entry}" if entry else name for entry in entries}
    own = {entry: plots[each] for entry, each in stages.items()}
    charts: Mapping[str, Chart] = charts_of(own, params.max_points)
    figures = [outputs.figures(name, entry) for entry in entries]
    columns = entries if entries != [""] else ["value"]
    values = side_by_side(figures)
    rows = [[figure, *cells] for figure, cells in values.items()]
    tables: list[dict[str, Any]] = [
        {"title": f"All {len(rows)} figures", "columns": ["figure", *columns], "rows": rows}
    ]
    for entry, each in stages.items():
        for table in read_tables(DATA / place_of(each) / "tables"):
            tables.append({**table, "title": f"{entry}: {table['title']}" if entry else table["title"]})
    for table in tables_of(own, params.max_rows):
        tables.append({**table, "path": f"data/{name}/{'*/' if entries != [''] else ''}plots/{table['name']}.csv"})
    return {
        "name": name,
        "known": known is not None,
        "title": known.title if known else name,
        "did": said_of(known.did, {**figures[-1], "entries": len(entries)}) if known else "",
        "entries": entries,
        "findings": [each for each in findings if each["finding"].chapter == name],
        "plots": [
            {"title": chart.title, "svg": drawn(chart, name=f"{name}-{plot}")}
            for plot, chart in charts.items()
            if known is None or plot in known.plots
        ],
        "tables": tables,
    }


def code(words: str) -> Any:
    """Return words for the page, those in backticks as code."""
    import markupsafe

    parts = [markupsafe.escape(part) for part in words.split("`")]
    return markupsafe.Markup("").join(
        markupsafe.Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in enumerate(parts)
    )


def render(**content: Any) -> str:
    """Return the page of page.html, with all words escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = code
    return environment.get_template("page.html").render(marks=MARKS, says=SAYS, **content)


if __name__ == "__main__":
    start(Params, run)
