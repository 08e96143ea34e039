"""Write one page about the whole pipeline, for a browser without server or network, and what `dvc` shows of it.

Covers the stages that this one waits for in the current dvc.yaml: those of a removed round are left out, even if their
files still exist. Reads their metrics.json, and what `stage.plot` and `stage.show` wrote into their plots/ and tables/.
Writes

- index.html                     every figure, the tables and the plots
- metrics/<place>.json           the figures that dvc.yaml's `meta: figures` names; for `dvc metrics`
- plots/<kind>/<place>/NAME.csv  title, x, y, series; for `dvc plots`, whose templates are .dvc/plots/<kind>.json

A change to a plot's declaration in a stage's code shows once that stage has run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.running.files import write_json
from tasks.running.params import Section
from tasks.running.places import DATA, place_of
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage, start

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("page.html")


class Params(Section):
    """Parameters of `report`."""

    plot_width: float = Field(gt=1, description="width of a plot, inches")
    line_plot_height: float = Field(gt=1, description="height of a plot of curves, inches")
    bar_height: float = Field(gt=0, description="height of one bar, inches")
    max_bars: int = Field(gt=0, description="maximum bars of a plot; the CSV file has all")


def stages_before(name: str) -> dict[str, list[str]]:
    """Return the stages that a stage waits for, in dvc.yaml's order, each with the figures named in its `meta`."""
    import networkx
    from dvc.repo import Repo

    index = Repo().index
    (last,) = [stage for stage in index.stages if stage.addressing == name]
    needed = networkx.descendants(index.graph, last)
    return {
        stage.addressing: list((stage.meta or {}).get("figures", []))
        for stage in index.stages
        if stage in needed and not stage.is_data_source
    }


def read_plots(directory: Path) -> Iterator[tuple[str, Plot, pd.DataFrame]]:
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
        title = json.loads(path.read_text(encoding="utf-8"))["title"]
        yield {"title": title, "columns": list(table.columns), "rows": table.to_numpy().tolist()}


def plot_svg(plot: Plot, points: pd.DataFrame, params: Params, path: Path) -> str:
    """Return a plot as SVG; it is first written to `path`."""
    bars = points.head(params.max_bars)
    height = 0.8 + params.bar_height * len(bars) if plot.kind == "bars" else params.line_plot_height
    with picture(path, params.plot_width, height) as axes:
        if plot.kind == "bars":
            plot_bars(axes, bars)
        else:
            plot_curves(axes, points, plot.y_label)
        axes.set_xlabel(plot.x_label)
        axes.spines[["top", "right"]].set_visible(False)
    return "<svg" + path.read_text(encoding="utf-8").partition("<svg")[2]


def plot_bars(axes: Any, points: pd.DataFrame) -> None:
    """Plot one bar per row, the first on top, with its length written beside it."""
    bars = axes.barh(range(len(points)), points["x"], color="#4472a8")
    axes.set_yticks(range(len(points)), points["y"])
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def plot_curves(axes: Any, points: pd.DataFrame, y_label: str) -> None:
    """Plot one curve for each series."""
    series = list(points.groupby("series", sort=False))
    for name, own in series:
        axes.plot(own["x"], own["y"], label=name, marker="o" if len(own) < 12 else None, markersize=3)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)


def run(stage: Stage[Params]) -> dict[str, float]:
    """Write the page, and the figures and plots for DVC."""
    stages: list[dict[str, Any]] = []
    for name, chosen in stages_before(stage.name).items():
        place = place_of(name)
        if not (DATA / place / "metrics.json").exists():
            continue
        figures = json.loads((DATA / place / "metrics.json").read_text(encoding="utf-8"))
        main = {figure: figures[figure] for figure in chosen if figure in figures}
        write_json(stage.output / "metrics" / f"{place}.json", main)
        plots = []
        for plot_name, plot, points in read_plots(DATA / place / "plots"):
            path = stage.output / "plots" / plot.kind / place / f"{plot_name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            points.to_csv(path, index=False)
            svg = plot_svg(plot, points, stage.params, stage.scratch / "plot.svg")
            plots.append({"title": plot.title, "svg": svg})
        tables = list(read_tables(DATA / place / "tables"))
        stages.append({"name": name, "main": main, "all": figures, "tables": tables, "plots": plots})
    page = render(stages)
    (stage.output / "index.html").write_text(page, encoding="utf-8")
    (stage.artifacts / "report.html").write_text(page, encoding="utf-8")
    return {"stages": len(stages), "plots": sum(len(entry["plots"]) for entry in stages)}


def render(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Each stage has `name`, `main` and `all` figures, `tables` as `read_tables` gives them, `plots` of `title` and `svg`.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(stages=stages)


if __name__ == "__main__":
    start(Params, run)
