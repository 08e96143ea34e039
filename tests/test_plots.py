from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pandas
import pytest

from tasks.running.plots import Plot, picture, write_plot

SHARES = Plot("bars", "Shares", "share", "name", "share of all", "name")
TABLE = pandas.DataFrame({"name": ["x"], "share": [0.5]})


def test_a_table_is_written_with_how_to_plot_it(tmp_path: Path) -> None:
    write_plot(tmp_path / "plots", "shares", TABLE, SHARES)
    assert (tmp_path / "plots" / "shares.csv").read_text() == "name,share\nx,0.5\n"
    assert Plot(**json.loads((tmp_path / "plots" / "shares.json").read_text())) == SHARES


def test_two_tables_of_one_name_never_overwrite_each_other(tmp_path: Path) -> None:
    write_plot(tmp_path, "shares", TABLE, SHARES)
    with pytest.raises(AssertionError, match=r"two tables with the same name: .*shares.csv"):
        write_plot(tmp_path, "shares", TABLE, SHARES)


def test_a_column_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"shares.csv has the columns name, not share"):
        write_plot(tmp_path, "shares", TABLE[["name"]], SHARES)


def test_dollars_in_names_start_no_formula(tmp_path: Path) -> None:
    name = r"costs $5_ or $\frac"
    with picture(tmp_path / "bars.svg", 4, 3) as axes:
        axes.bar([name], [1])
        axes.set_title(name)
    assert (tmp_path / "bars.svg").read_text().count(f"<!-- {name} -->") == 2
    assert mpl.rcParams["text.parse_math"]  # as before, for whoever else plots in this process


def test_a_picture_of_several_panels_comes_out_the_same_twice(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        with picture(tmp_path / name, 4, 3, ncols=2) as (left, right):
            left.plot([1, 2], [3, 4])
            right.plot([1, 2], [4, 3])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
