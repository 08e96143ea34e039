from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import repro

from tasks.report.__main__ import Params, panels_svg, plot_svg, read_plots, read_tables, render, sections_of
from tasks.running.plots import Plot, write_plot, write_table

PARAMS = Params(plot_width=6, line_plot_height=3, panel_height=2, num_panels=2, bar_height=0.3, max_bars=2)
BARS = Plot("bars", "Shares", "share", "name", "share of all", "name")
CURVES = Plot("curves", "Loss by source", "tokens", "loss", "tokens", "nats", "source")
ROOT = Path(__file__).parent.parent

# What each round of the pipeline writes: a plot of every kind, and words that pandas or matplotlib could mistake.
MAKE = """\
import sys
from pathlib import Path
import pandas
from tasks.running.files import write_json
from tasks.running.plots import Plot, write_plot

place = Path(sys.argv[1])
write_json(place / "metrics.json", {"loss": float(sys.argv[2]), "steps": 7})
curves = pandas.DataFrame({"tokens": [1, 2, 1, 2], "loss": [4.0, 3.0, 2.0, 1.0], "source": ["a", "a", "b", "b"]})
write_plot(place / "plots", "loss", curves, Plot("curves", "Loss", "tokens", "loss", "tokens", "nats", "source"))
bars = pandas.DataFrame({"name": ["None", "$x$"], "share": [0.25, 0.75]})
write_plot(place / "plots", "shares", bars, Plot("bars", "Shares", "share", "name", "share of all", "name"))
steps = pandas.DataFrame({"after": ["read", "1"], "share": [1.0, 0.5]})
write_plot(place / "plots", "left", steps, Plot("steps", "Left", "after", "share", "rule", "share"))
"""
PIPELINE = """\
stages:
  train:
    foreach: ${rounds}
    do:
      cmd: exec PYTHON make.py data/train/${key} ${item}
      outs: ["data/train/${key}"]
      meta: {figures: [loss, gone]}
  report:
    cmd: exec PYTHON -m tasks.report
    deps: [data/train]
    params: [seed, report, rounds]
    outs: [data/report]
"""


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(directory: Path, table: pandas.DataFrame, plot: Plot) -> pandas.DataFrame:
    write_plot(directory, "table", table, plot)
    ((_, found, points),) = read_plots(directory)
    assert found == plot
    return points


def write_rounds(**rounds: float) -> None:
    params = Path("params.yaml").read_text().partition("rounds:")[0]
    Path("params.yaml").write_text(f"{params}rounds: {json.dumps(rounds)}\n")


@pytest.fixture
def rounds(workspace: Path) -> Path:
    """A pipeline of two rounds and a report, with our dvc.yaml's plots and metrics; the report is made."""
    shown = (ROOT / "dvc.yaml").read_text().partition("\nmetrics:")
    (workspace / "dvc.yaml").write_text(PIPELINE.replace("PYTHON", sys.executable) + shown[1] + shown[2])
    (workspace / "make.py").write_text(MAKE)
    shutil.copytree(ROOT / ".dvc" / "plots", workspace / ".dvc" / "plots")
    with (workspace / "params.yaml").open("a") as file:
        file.write(f"report: {PARAMS.model_dump_json()}\n")
    write_rounds(v1=1.5, v2=0.5)
    result = repro()
    assert result.returncode == 0, result.stderr
    return workspace


def specifications(*arguments: str) -> dict[str, Any]:
    """What `dvc plots` draws, by the plots' names."""
    page = Path(dvc("plots", *arguments, "-o", "shown").strip().removeprefix("file://")).read_text()
    parts = [json.JSONDecoder().raw_decode(part)[0] for part in page.split("var spec = ")[1:]]
    return {part["title"]["text"].removeprefix("data/report/plots/"): part for part in parts}


@pytest.mark.slow
def test_each_round_is_in_the_report_and_in_what_dvc_shows_until_it_is_removed(rounds: Path) -> None:
    assert json.loads(Path("data/report/metrics.json").read_text()) == {"stages": 2, "plots": 6}
    page = Path("data/report/index.html").read_text()
    assert page.count('<section id="train">') == page.count("<section") == 1
    assert "<tr><td>loss</td><td>1.5</td><td>0.5</td></tr>" in page
    assert page.count("<svg") == 4  # loss and left of both rounds together, shares of each
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", "two rounds"], check=True)
    figures = json.loads(dvc("metrics", "show", "--json"))[""]["data"]
    assert {path: entry["data"] for path, entry in figures.items()} == {
        "data/report/metrics/train/v1.json": {"loss": 1.5},
        "data/report/metrics/train/v2.json": {"loss": 0.5},
    }
    drawn = specifications("show")
    names = ("bars/train/{}/shares.csv", "curves/train/{}/loss.csv", "steps/train/{}/left.csv")
    assert set(drawn) == {name.format(entry) for name in names for entry in ("v1", "v2")}

    write_rounds(v2=0.25)
    result = repro()
    assert result.returncode == 0, result.stderr
    assert Path("data/train/v1/metrics.json").exists()  # left over; DVC deletes nothing
    page = Path("data/report/index.html").read_text()
    assert "<th>v2</th>" in page
    assert "<th>v1</th>" not in page
    assert set(specifications("show")) == {name.format("v2") for name in names}
    changes = json.loads(dvc("metrics", "diff", "--json"))
    assert changes["data/report/metrics/train/v2.json"]["loss"] == {"old": 0.5, "new": 0.25, "diff": -0.25}


@pytest.mark.slow
def test_dvc_draws_a_curve_for_each_series_and_words_as_people_wrote_them(rounds: Path) -> None:
    drawn = specifications("show")
    curves = drawn["curves/train/v1/loss.csv"]
    assert curves["encoding"]["color"]["field"] == "series"
    rows = [{name: row[name] for name in ("title", "series", "x", "y")} for row in curves["data"]["values"]]
    assert rows[2] == {"title": "Loss (nats against tokens)", "series": "b", "x": "1", "y": "2.0"}
    bars = drawn["bars/train/v1/shares.csv"]
    assert [(row["y"], row["x"]) for row in bars["data"]["values"]] == [("None", "0.25"), ("$x$", "0.75")]
    steps = drawn["steps/train/v1/left.csv"]
    assert (steps["encoding"]["x"]["type"], steps["encoding"]["x"]["sort"]) == ("nominal", None)
    assert [row["x"] for row in steps["data"]["values"]] == ["read", "1"]


def test_curves_are_plotted_one_for_each_series_and_the_same_every_time(tmp_path: Path) -> None:
    table = pandas.DataFrame({"tokens": [1, 2, 1, 2], "loss": [3.5, 3.0, 2.5, 2.0], "source": ["a", "a", "b", "b"]})
    points = read(tmp_path, table, CURVES)
    assert points["series"].tolist() == ["a", "a", "b", "b"]
    svg = plot_svg(CURVES, points, PARAMS, tmp_path / "plot.svg")
    assert svg.startswith("<svg")
    assert svg.count('id="legend_1"') == 1
    assert plot_svg(CURVES, points, PARAMS, tmp_path / "plot.svg") == svg


def test_no_more_bars_are_plotted_than_asked(tmp_path: Path) -> None:
    points = read(tmp_path, pandas.DataFrame({"name": ["x", "y", "z"], "share": [0.5, 0.25, 0.125]}), BARS)
    svg = plot_svg(BARS, points, PARAMS, tmp_path / "plot.svg")
    assert "<!-- 0.25 -->" in svg
    assert "<!-- 0.125 -->" not in svg


def test_names_are_plotted_as_people_wrote_them(tmp_path: Path) -> None:
    names = ["None", r"$\frac$", "NA", "", "0.50"]
    points = read(tmp_path, pandas.DataFrame({"name": names, "share": [0.5, 0.1, 0.2, 0.3, None]}), BARS)
    assert points["y"].tolist() == names
    assert points["x"].tolist()[:4] == [0.5, 0.1, 0.2, 0.3]
    assert points["x"].isna().tolist()[4]
    svg = plot_svg(BARS, points, PARAMS, tmp_path / "plot.svg")
    assert "<!-- None -->" in svg
    assert r"<!-- $\frac$ -->" in svg


def test_a_table_without_rows_is_left_out(tmp_path: Path) -> None:
    write_plot(tmp_path, "shares", pandas.DataFrame(columns=["name", "share"]), BARS)
    assert list(read_plots(tmp_path)) == []


def test_a_table_is_shown_as_it_was_written(tmp_path: Path) -> None:
    table = pandas.DataFrame(
        {"version": ["v1", "None"], "win rate": ["61.0%\n55.2% to 66.5%", "NA"], "left": ["", "1"]}
    )
    write_table(tmp_path, "versions", table, "Versions")
    (found,) = read_tables(tmp_path)
    assert found == {
        "title": "Versions",
        "columns": ["version", "win rate", "left"],
        "rows": [["v1", "61.0%\n55.2% to 66.5%", ""], ["None", "NA", "1"]],
    }
    stage = {"name": "compare", "main": {}, "all": {}, "tables": [found], "plots": []}
    page = render(sections_of([stage], PARAMS, tmp_path / "plot.svg"))
    assert "<td>61.0%\n55.2% to 66.5%</td>" in page
    assert "<th>win rate</th>" in page
    assert list(read_tables(tmp_path / "none")) == []


def test_names_are_no_markup_on_the_page() -> None:
    page = render(
        [
            {
                "name": "sft",
                "entries": [""],
                "main": {"<b>": [1]},
                "all": {"<b>": [1]},
                "tables": [{"title": "<u>", "columns": ["<th>"], "rows": [["<td>"]]}],
                "plots": [{"title": "<i>", "svg": "<svg/>", "folded": False}],
            }
        ]
    )
    assert "&lt;u&gt;" in page
    assert page.count("&lt;th&gt;") == page.count("&lt;td&gt;") == 1
    assert "<svg/>" in page
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;" in page


def plots_of(directory: Path, **tables: tuple[pandas.DataFrame, Plot]) -> list[tuple[str, Plot, pandas.DataFrame]]:
    for name, (table, plot) in tables.items():
        write_plot(directory, name, table, plot)
    return list(read_plots(directory))


def test_rounds_of_a_stage_are_side_by_side_and_the_comparison_is_first(tmp_path: Path) -> None:
    curves = pandas.DataFrame({"tokens": [1, 2], "loss": [3.5, 3.0], "source": ["a", "a"]})
    bars = pandas.DataFrame({"name": ["x"], "share": [0.5]})
    stages: list[dict[str, Any]] = [
        {"name": "world", "main": {"documents": 1000}, "all": {"documents": 1000}, "tables": [], "plots": []},
        *(
            {
                "name": f"train@{entry}",
                "main": {"loss": loss},
                "all": {"loss": loss, **extra},
                "tables": [{"title": "Samples", "columns": ["text"], "rows": [[entry]]}],
                "plots": plots_of(tmp_path / entry, loss=(curves, CURVES), shares=(bars, BARS)),
            }
            for entry, loss, extra in (("v1", 3.0, {}), ("v2", 2.5, {"earlier": 0.25}))
        ),
        {"name": "compare", "main": {}, "all": {}, "tables": [], "plots": []},
    ]
    sections = sections_of(stages, PARAMS, tmp_path / "plot.svg")
    assert [section["name"] for section in sections] == ["compare", "world", "train"]
    train = sections[2]
    assert train["entries"] == ["v1", "v2"]
    assert train["main"] == {"loss": [3.0, 2.5]}
    assert train["all"] == {"loss": [3.0, 2.5], "earlier": [None, 0.25]}
    assert [table["title"] for table in train["tables"]] == ["v1: Samples", "v2: Samples"]
    titles = [(plot["title"], plot["folded"]) for plot in train["plots"]]
    assert titles == [("Loss by source", False), ("v1: Shares", True), ("v2: Shares", True)]
    assert all(f"<!-- {entry} -->" in train["plots"][0]["svg"] for entry in ("v1", "v2"))
    page = render(sections)
    assert "<tr><td>earlier</td><td></td><td>0.25</td></tr>" in page
    assert "<tr><th></th><th>v1</th><th>v2</th></tr>" in page
    assert "<b>1,000</b>documents" in page


def test_panels_have_common_axes_and_one_legend(tmp_path: Path) -> None:
    low = pandas.DataFrame({"title": "", "x": [1, 2], "y": [0.0, 1.0], "series": ["a", "b"]})
    high = pandas.DataFrame({"title": "", "x": [1, 2], "y": [70.0, 80.0], "series": ["b", "c"]})
    entries = {"v1": low, "v2": high, "v3": high}
    svg = panels_svg(CURVES, entries, PARAMS, tmp_path / "plot.svg")
    assert svg.count('id="legend_1"') == 1
    assert 'id="legend_2"' not in svg
    assert [svg.count(f"<!-- {name} -->") for name in ("a", "b", "c", "v1", "v2", "v3")] == [1] * 6
    assert svg.count("<!-- 75 -->") == 2  # on the left of each row, for all panels
    assert svg.count("<!-- 2.0 -->") == 2  # below the last panel of each column
    assert panels_svg(CURVES, entries, PARAMS, tmp_path / "plot.svg") == svg
