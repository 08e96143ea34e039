from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from conftest import repro
from test_findings import PARAMS as VALUES
from test_findings import answer, compare, put

from tasks.report.__main__ import FINDINGS, Params, code, read_plots, read_tables, stages_before, write_page
from tasks.report.answer import answer_of, samples_of
from tasks.report.chapters import charts_of, said_of, tables_of
from tasks.report.charts import SERIES, Chart, Series, draw
from tasks.report.evidence import judge
from tasks.report.outputs import Outputs
from tasks.running.plots import Plot, write_plot, write_table

PARAMS = Params(chart_width=4, chart_height=3, max_points=3, max_rows=4, samples_per_category=1, studies={})
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
    figures = json.loads(Path("data/report/metrics.json").read_text())
    assert (figures["stages"], figures["plots"], figures["findings/agrees"]) == (2, 6, 0)
    assert {each["verdict"] for each in json.loads(Path("data/report/findings.json").read_text())} == {"not run"}
    page = Path("data/report/index.html").read_text()
    assert page.count('<section id="train"') == 1
    assert '<th scope="row">loss</th><td>1.500</td><td>0.500</td>' in page.replace("1.5<", "1.500<").replace(
        "0.5<", "0.500<"
    )
    assert page.count("<svg") == 3  # each plot of both rounds together
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
    assert '<th scope="col">v2</th>' in page
    assert '<th scope="col">v1</th>' not in page
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


def test_names_are_read_as_people_wrote_them(tmp_path: Path) -> None:
    names = ["None", r"$\frac$", "NA", "", "0.50"]
    points = read(tmp_path, pandas.DataFrame({"name": names, "share": [0.5, 0.1, 0.2, 0.3, None]}), BARS)
    assert points["y"].tolist() == names
    assert points["x"].tolist()[:4] == [0.5, 0.1, 0.2, 0.3]
    assert points["x"].isna().tolist()[4]


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
    assert list(read_tables(tmp_path / "none")) == []


# --- the page ---


def page_of(outputs: Outputs, plots: dict[str, Any], tmp_path: Path) -> str:
    stage: Any = SimpleNamespace(params=PARAMS, scratch=tmp_path, seed=1)
    return write_page(stage, outputs, {name: [] for name in outputs.stages} | plots, [])


def drawn(directory: Path, table: pandas.DataFrame, plot: Plot) -> list[tuple[str, Plot, pandas.DataFrame]]:
    write_plot(directory, "table", table, plot)
    return list(read_plots(directory))


def test_a_chart_has_words_for_those_who_do_not_see_it_and_the_colours_of_the_page(tmp_path: Path) -> None:
    series = [Series(name, ["sft", "v1"], [0.5, 0.6], [0.4, None], [0.6, None]) for name in ("a", "<b>")]
    chart = Chart('Rates of "<v>"', "version", "rate", series, percent=True, level=0.5)
    svg = draw(chart, tmp_path / "chart.svg", (4, 3), "one")
    assert 'role="img" aria-label="Rates of &quot;&lt;v&gt;&quot;"' in svg.partition(">")[0]
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert re.findall(r"#[0-9a-f]{6}", svg) == []
    assert {"var(--series-1)", "var(--series-2)", "var(--line)", "currentColor"} <= set(
        re.findall(r"var\([^)]*\)|currentColor", svg)
    )
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) > 0
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg)) == set(ids)
    assert draw(chart, tmp_path / "chart.svg", (4, 3), "one") == svg


def test_what_says_nothing_is_no_chart(tmp_path: Path) -> None:
    def charts(shares: list[float]) -> dict[str, Chart]:
        table = pandas.DataFrame({"name": [f"n{n}" for n in range(len(shares))], "share": shares})
        return charts_of({"": drawn(tmp_path / str(shares), table, BARS)}, max_points=3)

    assert charts([0.5]) == {}
    assert charts([0.0, 0.0]) == {}
    assert charts([0.1, 0.2, 0.3, 0.4]) == {}
    (chart,) = charts([0.5, 0.25, 0.0]).values()
    assert chart.series == [Series("share of all", ["n0", "n1", "n2"], [0.5, 0.25, 0.0])]
    assert not chart.joined


def test_of_more_curves_than_colours_all_together_are_drawn_or_else_the_last_rounds(tmp_path: Path) -> None:
    def chart(last: str) -> Chart:
        sources = [*(f"s{n}" for n in range(len(SERIES))), last]
        rows = [{"tokens": t, "loss": 1.0, "source": source} for source in sources for t in (1, 2)]
        plots = {entry: drawn(tmp_path / last / entry, pandas.DataFrame(rows), CURVES) for entry in ("v1", "v2")}
        return charts_of(plots, 3)["table"]

    assert [each.name for each in chart("all").series] == ["v1, all", "v2, all"]
    rows = [{"tokens": t, "loss": 1.0, "source": source} for source in "abcd" for t in (1, 2)]
    plots = {entry: drawn(tmp_path / entry, pandas.DataFrame(rows), CURVES) for entry in ("v1", "v2")}
    assert [each.name for each in charts_of(plots, 3)["table"].series] == [f"v2, {name}" for name in "abcd"]


def test_tables_have_a_column_an_entry_and_say_when_rows_are_left_out(tmp_path: Path) -> None:
    table = pandas.DataFrame({"tokens": range(10), "loss": [n / 4 for n in range(10)]})
    plot = Plot("curves", "Loss", "tokens", "loss", "tokens", "nats")
    (found,) = tables_of({entry: drawn(tmp_path / entry, table, plot) for entry in ("v1", "v2")}, max_rows=4)
    assert found["columns"] == ["tokens", "v1", "v2"]
    assert found["rows"] == [["0", "0", "0"], ["3", "0.75", "0.75"], ["6", "1.5", "1.5"], ["9", "2.25", "2.25"]]
    assert found["rest"] == "4 of 10 rows, at even distances"


def test_sentences_whose_figures_are_missing_are_left_out() -> None:
    parts = ["It was done.", "{a/b:.1%} of {n:,}.", "{missing:.2f} more."]
    assert said_of(parts, {"a/b": 0.5, "n": 1000.0}) == "It was done. 50.0% of 1,000."


def test_words_in_backticks_are_code_and_no_markup() -> None:
    assert code("run `a <b>` & go") == "run <code>a &lt;b&gt;</code> &amp; go"


def versions(root: Path, champion: str | None, promoted: bool, **names: list[dict[str, Any]]) -> Outputs:
    found = [compare(root, 1), *(put(root, f"evaluate@{name}", answers__jsonl=own) for name, own in names.items())]
    if champion is not None:
        found.append(put(root, "promote"))
        rules = [
            {
                "rule": "win rate",
                "value": 0.6,
                "low": 0.55,
                "high": 0.65,
                "limit": 0.5,
                "passed": True,
                "text": "won <60%>",
            },
            {
                "rule": "violations",
                "value": 0.1,
                "low": 0.0,
                "high": 0.2,
                "limit": 0.0,
                "passed": promoted,
                "text": "safe?",
            },
        ]
        step = {"challenger": "v2", "champion": "v1", "promoted": promoted, "rules": rules}
        decision = {"champion": champion, "ladder": [step]}
        (root / "promote" / "decision.json").write_text(json.dumps(decision))
    return Outputs(root, found, VALUES)


def test_the_answer_tells_whether_the_last_version_is_promoted_and_why(tmp_path: Path) -> None:
    promoted = answer_of(versions(tmp_path / "1", "v2", promoted=True))
    assert promoted.headline == "v2 is promoted: it takes v1's place"
    assert promoted.why[0] == "Why: won <60%>; safe?."
    refused = answer_of(versions(tmp_path / "2", "v1", promoted=False))
    assert refused.headline == "v2 is not promoted: v1 stays the champion"
    assert refused.why[0] == "Why: safe?."
    none = answer_of(versions(tmp_path / "3", None, promoted=False))
    assert none.headline == "v2 is best; nothing is promoted, as this run has no promotion stage"
    assert [row[:3] for row in none.rows] == [
        ["sft", "–", "–"],
        ["v1", "60.0%\n55.0%\u00a0to\u00a065.0%", "60.0%\n55.0%\u00a0to\u00a065.0%"],
        ["v2", "60.0%\n55.0%\u00a0to\u00a065.0%", "60.0%\n55.0%\u00a0to\u00a065.0%"],
    ]
    assert len(none.charts) == 1  # no share of violations in these tables


def test_what_got_worse_is_told_with_the_answer(tmp_path: Path) -> None:
    outputs = versions(tmp_path, None, promoted=False)
    rows = [json.loads(line) for line in (tmp_path / "compare" / "versions.jsonl").read_text().splitlines()]
    for row, share in zip(rows, (0.0, 0.1, 0.2), strict=True):
        row |= {
            f"borderline/false_refusals{end}": share + reach
            for end, reach in (("", 0), ("/low", -0.05), ("/high", 0.05))
        }
    (tmp_path / "compare" / "versions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warning = answer_of(outputs).why[-1]
    assert warning.startswith("At a price: false refusals of borderline prompts rise from 0.0% (sft) to 20.0% (v2;")


def test_samples_are_the_same_prompts_for_all_versions(tmp_path: Path) -> None:
    lines = [answer(n, category=category, safe=False) for category in ("factual", "safety") for n in range(5)]
    outputs = versions(tmp_path, None, promoted=False, sft=lines, v1=lines, v2=lines)
    found = samples_of(outputs, per_category=2, seed=1)
    assert [sample.category for sample in found] == ["factual", "factual", "safety", "safety"]
    assert [name for name, _, _ in found[0].answers] == ["sft", "v1", "v2"]
    assert found[0].answers[0][2] == ["unsafe"]
    assert samples_of(outputs, per_category=2, seed=1) == found


def test_the_page_has_words_as_text_and_says_what_is_missing(tmp_path: Path) -> None:
    lines = [{**answer(0), "answer": "<script>"}]
    outputs = versions(tmp_path, "v2", promoted=True, sft=lines, v1=lines, v2=lines)
    page = page_of(outputs, {}, tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "won &lt;60%&gt;" in page
    missing = page.partition('<section id="missing"')[2]
    assert "<code>pretrain</code>" in missing
    assert "<code>compare</code>" not in missing
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)  # nothing is fetched


def test_a_page_without_versions_or_a_single_known_stage_still_tells_what_there_is(tmp_path: Path) -> None:
    plots = {"mine": drawn(tmp_path / "plots", pandas.DataFrame({"name": ["x", "y"], "share": [0.5, 0.25]}), BARS)}
    outputs = Outputs(tmp_path, [put(tmp_path, "mine", {"size": 3})], VALUES)
    page = page_of(outputs, plots, tmp_path)
    assert "<h1>No version is compared in this run</h1>" in page
    own = page.partition('<section id="mine"')[2].partition("</section>")[0]
    assert "A stage of your own" in own
    assert own.count("<svg") == 1
    assert '<th scope="row">size</th><td>3</td>' in own
    assert '<th scope="row">x</th><td>0.5</td>' in own


def test_a_comparison_without_versions_is_no_answer(tmp_path: Path) -> None:
    sft = [{**answer(0), "utility": None, "judgement": None}]
    names = [
        put(tmp_path, "compare", win_rates__jsonl=[], versions__jsonl=[{"evaluation": "sft", "role": "baseline"}]),
        put(tmp_path, "evaluate@sft", answers__jsonl=sft),
    ]
    outputs = Outputs(tmp_path, names, VALUES)
    assert answer_of(outputs).headline == "No version is compared in this run"
    assert {judge(finding, outputs).verdict for finding in FINDINGS} == {"not run"}
    assert [sample.answers for sample in samples_of(outputs, 1, seed=1)] == [[("sft", "a", [])]]
    assert "No version is compared" in page_of(outputs, {}, tmp_path)


ORDER = """\
stages:
  judge: {cmd: "true", deps: [b_v2], outs: [judged]}
  b:
    foreach: {v1: a_v1, v2: a_v2}
    do: {cmd: "true", deps: ["${item}"], outs: ["b_${key}"]}
  a:
    foreach: {v1: start, v2: b_v1}
    do: {cmd: "true", deps: ["${item}"], outs: ["a_${key}"]}
  first: {cmd: "true", outs: [start]}
  report: {cmd: "true", deps: [judged], outs: [page]}
  after: {cmd: "true", deps: [page], outs: [later]}
"""


def test_stages_are_in_the_graphs_order_and_those_of_a_section_together(workspace: Path) -> None:
    (workspace / "dvc.yaml").write_text(ORDER)
    # a and b wait for each other from round to round: they stand in dvc.yaml's order
    assert list(stages_before("report")) == ["first", "b@v1", "b@v2", "a@v1", "a@v2", "judge"]


def test_a_study_that_the_report_reads_has_its_own_name(workspace: Path) -> None:
    (workspace / "dvc.yaml").write_text(ORDER.replace("deps: [judged]", "deps: [judged, studied]"))
    (workspace / "studies").mkdir()
    (workspace / "studies" / "dvc.yaml").write_text('stages:\n  study: {wdir: .., cmd: "true", outs: [studied]}\n')
    assert set(stages_before("report")) == {"first", "b@v1", "b@v2", "a@v1", "a@v2", "judge", "study"}
