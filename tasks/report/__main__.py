"""One page about the whole pipeline, for a browser, with no server and no network.

Shows each stage's figures (metrics.json) and draws the plots that dvc.yaml's `plots` section declares, from the CSV
files that it names: the page and `dvc plots` show the same. Of what dvc.yaml names it shows what it depends on, so that
DVC draws it anew when that changes. Reads dvc.yaml and data/*/. Writes data/report/index.html.
DVC refuses to watch dvc.yaml itself: when nothing but a plot's definition changed, `dvc repro -f report` draws it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.stage import Stage, start

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("report.html")


class Params(Section):
    """Parameters of `report`."""

    plot_width: float = Field(gt=1, description="width of a plot, inches")
    line_plot_height: float = Field(gt=1, description="height of a plot of curves, inches")
    bar_height: float = Field(gt=0, description="height of one bar, inches")
    max_bars: int = Field(gt=0, description="bars of a plot at most; the CSV file has all")


def read_pipeline() -> dict[str, Any]:
    """Return dvc.yaml as a dictionary."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe").load(Path("dvc.yaml").read_text(encoding="utf-8")))


def stage_figures(pipeline: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each stage that `report` depends on, those that `meta: figures` names first.

    The order is dvc.yaml's; a stage that has not run is left out.
    """
    needed = [Path(dependency) for dependency in pipeline["stages"]["report"]["deps"]]
    stages = []
    for name, definition in pipeline["stages"].items():
        chosen = definition.get("do", definition).get("meta", {}).get("figures", [])
        for path in sorted((DATA / name).glob("*/metrics.json" if "foreach" in definition else "metrics.json")):
            if not any(path.is_relative_to(dependency) for dependency in needed):
                continue
            metrics = json.loads(path.read_text(encoding="utf-8"))
            main = {key: metrics[key] for key in chosen if key in metrics}
            title = "@".join(path.parent.relative_to(DATA).parts)
            stages.append({"name": title, "main": main, "all": dict(sorted(metrics.items()))})
    return stages


def draw(definition: Mapping[str, Any], params: Params) -> str:
    """Return one of dvc.yaml's plots as SVG: bars for the bar templates, else curves.

    Raises ValueError when a column that the plot names is not in its file.
    """
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "arriero"  # the same bytes every time
    from matplotlib import pyplot as plt

    ((file, columns),) = definition["y"].items()
    table = pd.read_csv(file)
    names = [columns] if isinstance(columns, str) else list(columns)
    missing = [name for name in [definition["x"], *names] if name not in table.columns]
    if missing:
        found = ", ".join(table.columns)
        raise ValueError(f"dvc.yaml: plot of {file} names column `{missing[0]}`; the file has {found}")
    is_bars = str(definition.get("template", "")).startswith("bar")
    height = params.line_plot_height
    if is_bars:
        height = 0.8 + params.bar_height * min(len(table), params.max_bars)
    figure, axes = plt.subplots(figsize=(params.plot_width, height), layout="constrained")
    if is_bars:
        draw_bars(axes, table.head(params.max_bars), definition["x"], names[0])
    else:
        draw_curves(axes, table, definition["x"], names)
    axes.set_xlabel(definition.get("x_label", definition["x"]))
    axes.spines[["top", "right"]].set_visible(False)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def draw_bars(axes: Axes, table: pd.DataFrame, length: str, label: str) -> None:
    """Draw one bar a row, the first on top, with its length written beside it."""
    bars = axes.barh(table[label].astype(str), table[length], color="#4472a8")
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def draw_curves(axes: Axes, table: pd.DataFrame, x: str, names: list[str]) -> None:
    """Draw one curve a column, and one for each value of a column of words, such as `source`."""
    words = [name for name in table.columns if name != x and isinstance(table[name].iloc[0], str)]
    groups = list(table.groupby(words[0], sort=False)) if words else [("", table)]
    for group, rows in groups:
        for name in names:
            label = " ".join(part for part in (str(group), name if len(names) > 1 else "") if part)
            axes.plot(rows[x], rows[name], label=label, marker="o" if len(rows) < 12 else None, markersize=3)
    axes.set_ylabel(", ".join(names))
    axes.grid(alpha=0.3)
    if len(groups) * len(names) > 1:
        axes.legend(fontsize=8)


def run(stage: Stage[Params]) -> dict[str, float]:
    """Write the page."""
    import jinja2

    pipeline = read_pipeline()
    stages = stage_figures(pipeline)
    names = [entry["name"] for entry in stages]
    plots: dict[str, list[dict[str, str]]] = {}
    num_plots = 0
    for item in pipeline.get("plots", []):
        ((name, definition),) = item.items()
        file = Path(next(iter(definition["y"])))
        if file.exists():
            owner = next(name for name in names if file.is_relative_to(DATA / name.replace("@", "/")))
            plots.setdefault(owner, []).append(
                {"title": definition.get("title", name), "svg": draw(definition, stage.params)}
            )
            num_plots += 1
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(stages=stages, plots=plots)
    (stage.output / "index.html").write_text(page, encoding="utf-8")
    (stage.artifacts / "report.html").write_text(page, encoding="utf-8")
    return {"stages": len(stages), "plots": num_plots}


if __name__ == "__main__":
    start(Params, run)
