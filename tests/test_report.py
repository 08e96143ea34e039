from __future__ import annotations

from pathlib import Path

import pytest

from tasks.report.__main__ import Params, draw, stage_figures

PARAMS = Params(plot_width=6, line_plot_height=3, bar_height=0.3, max_bars=2)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "loss.csv"
    path.write_text("tokens,loss,source\n1,3.5,a\n2,3.0,a\n1,2.5,b\n2,2.0,b\n")
    return path


def test_curves_are_drawn_one_for_each_word_of_a_column_and_the_same_every_time(table: Path) -> None:
    definition = {"template": "linear", "x": "tokens", "y": {str(table): "loss"}, "x_label": "tokens seen"}
    svg = draw(definition, PARAMS)
    assert svg.startswith("<svg")
    assert svg.count('id="legend_1"') == 1
    assert draw(definition, PARAMS) == svg


def test_no_more_bars_are_drawn_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "shares.csv"
    path.write_text("name,share\nx,0.5\ny,0.25\nz,0.125\n")
    svg = draw({"template": "bar_horizontal", "x": "share", "y": {str(path): "name"}}, PARAMS)
    assert "<!-- 0.25 -->" in svg
    assert "<!-- 0.125 -->" not in svg


def test_a_plot_of_a_missing_column_is_refused(table: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dvc.yaml: plot of .*loss.csv names column `step`; the file has tokens, loss"
    ):
        draw({"x": "step", "y": {str(table): "loss"}}, PARAMS)


def test_figures_named_in_dvc_yaml_come_first_and_missing_stages_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/ppo/v5").mkdir(parents=True)
    Path("data/ppo/v5/metrics.json").write_text('{"reward": 1.5, "kl": 0.25}')
    Path("data/publish").mkdir()
    Path("data/publish/metrics.json").write_text('{"stages": 2}')  # written by a stage that comes after the report
    stage = {"cmd": "x", "meta": {"figures": ["reward", "gone"]}}
    report = {"cmd": "x", "deps": ["tasks/report.py", "data/sft/metrics.json", "data/ppo"]}
    pipeline = {
        "stages": {
            "sft": stage,
            "ppo": {"foreach": "${rounds}", "do": stage},
            "report": report,
            "publish": {"cmd": "x", "deps": ["data/report"]},
        }
    }
    assert stage_figures(pipeline) == [{"name": "ppo@v5", "main": {"reward": 1.5}, "all": {"kl": 0.25, "reward": 1.5}}]
