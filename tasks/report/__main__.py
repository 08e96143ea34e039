"""Write one page about the whole pipeline, for a browser without server or network, and what `dvc` shows of it.

Covers the stages that this one waits for in the current dvc.yaml: those of a removed round are left out, even if their
files still exist. Reads their metrics.json, and what `stage.plot` and `stage.show` wrote into their plots/ and tables/.
Writes

- index.html                     every figure, the tables and the plots: the comparison of versions first; the rounds of
                                 a stage, and its other entries, side by side
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
from tasks.running.places import DATA, entry_of, place_of, section_of
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage, start

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("page.html")


class Params(Section):
    """Parameters of `report`."""

    plot_width: float = Field(gt=1, description="width of a plot, inches")
    line_plot_height: float = Field(gt=1, description="height of a plot of curves, inches")
    panel_height: float = Field(gt=1, description="height of one of several plots side by side, inches")
    num_panels: int = Field(gt=0, description="plots side by side")
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


def panels_svg(plot: Plot, entries: Mapping[str, pd.DataFrame], params: Params, path: Path) -> str:
    """Return one plot of several entries as SVG, a panel for each, on common axes; it is first written to `path`."""
    columns = min(params.num_panels, len(entries))
    rows = -(-len(entries) // columns)
    shape = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
    names = list(dict.fromkeys(name for points in entries.values() for name in points["series"]))
    lines: dict[str, Any] = {}
    with picture(path, params.plot_width, params.panel_height * rows, **shape) as axes:
        for panel in axes.flat[len(entries) :]:
            panel.set_visible(False)
        for panel, (entry, points) in zip(axes.flat, entries.items(), strict=False):
            for name, own in points.groupby("series", sort=False):
                marker = "o" if len(own) < 12 else None
                colour = f"C{names.index(str(name))}"
                (lines[str(name)],) = panel.plot(own["x"], own["y"], color=colour, marker=marker, markersize=3)
            panel.set_title(entry, fontsize=9)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in axes.flat[len(entries) - columns : len(entries)]:
            panel.tick_params(labelbottom=True)  # also where the row below has no panel
        figure = axes[0, 0].figure
        figure.supxlabel(plot.x_label, fontsize=9)
        figure.supylabel(plot.y_label, fontsize=9)
        if len(lines) > 1:
            figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, fontsize=8)
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
        plots = list(read_plots(DATA / place / "plots"))
        for plot_name, plot, points in plots:
            path = stage.output / "plots" / plot.kind / place / f"{plot_name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            points.to_csv(path, index=False)
        tables = list(read_tables(DATA / place / "tables"))
        stages.append({"name": name, "main": main, "all": figures, "tables": tables, "plots": plots})
    page = render(sections_of(stages, stage.params, stage.scratch / "plot.svg"))
    (stage.output / "index.html").write_text(page, encoding="utf-8")
    (stage.artifacts / "report.html").write_text(page, encoding="utf-8")
    return {"stages": len(stages), "plots": sum(len(entry["plots"]) for entry in stages)}


# --- the page ---


def sections_of(stages: Sequence[Mapping[str, Any]], params: Params, path: Path) -> list[dict[str, Any]]:
    """Return the sections of the page, as `render` takes them: one a section of params.yaml, however many its entries.

    Each stage has `name`, `main` and `all` figures, `tables` and `plots` as they were read. The comparison of versions
    is first, as it is what all the others are for.
    """
    grouped: dict[str, dict[str, Mapping[str, Any]]] = {}
    for stage in stages:
        grouped.setdefault(section_of(stage["name"]), {})[entry_of(stage["name"])] = stage
    return [
        {
            "name": name,
            "entries": list(entries),
            "main": side_by_side([stage["main"] for stage in entries.values()]),
            "all": side_by_side([stage["all"] for stage in entries.values()]),
            "tables": [
                {**table, "title": f"{entry}: {table['title']}" if entry else table["title"]}
                for entry, stage in entries.items()
                for table in stage["tables"]
            ],
            "plots": pictures_of({entry: stage["plots"] for entry, stage in entries.items()}, params, path),
        }
        for name, entries in sorted(grouped.items(), key=lambda group: group[0] != "compare")
    ]


def side_by_side(figures: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Return each figure's values in several stages; None where a stage has none."""
    names = dict.fromkeys(name for own in figures for name in own)
    return {name: [own.get(name) for own in figures] for name in names}


def pictures_of(
    plots: Mapping[str, Sequence[tuple[str, Plot, pd.DataFrame]]], params: Params, path: Path
) -> list[dict[str, Any]]:
    """Return the plots of a section's entries as `title`, `svg` and `folded`.

    Curves of the same name are panels of one plot. Bars of several entries are folded, as there are many of them.
    """
    curves: dict[tuple[str, Plot], dict[str, pd.DataFrame]] = {}
    for entry, own in plots.items():
        for name, plot, points in own:
            key = name if plot.kind != "bars" else f"{name} {entry}"
            curves.setdefault((key, plot), {})[entry] = points
    found = []
    for (_, plot), entries in sorted(curves.items(), key=lambda item: item[0][0]):
        first, *others = entries
        alone = not others
        svg = plot_svg(plot, entries[first], params, path) if alone else panels_svg(plot, entries, params, path)
        title = f"{first}: {plot.title}" if first and alone else plot.title
        found.append({"title": title, "svg": svg, "folded": plot.kind == "bars" and len(plots) > 1})
    return found


def render(sections: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Each section has `name`, `entries`, `main` and `all` figures, each with a value an entry, `tables` as `read_tables`
    gives them, `plots` of `title`, `svg` and `folded`.
    """
    import jinja2

    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(sections=sections)


if __name__ == "__main__":
    start(Params, run)
