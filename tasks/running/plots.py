"""Plots of tables, and tables as they are, written by a stage and shown by `report`; and the drawing of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.running.files import write_json

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Plot:
    """How to plot a table, by its columns.

    - bars: one per row, of length `x` and labelled `y`
    - curves: `y` against the number `x`, one curve for each word in `series`
    - steps: `y` against the word `x`, in the table's order, one curve for each word in `series`
    """

    kind: Literal["bars", "curves", "steps"]
    title: str
    x: str
    y: str
    x_label: str
    y_label: str
    series: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are plotted."""
        return [name for name in (self.x, self.y, self.series) if name is not None]


def write_plot(directory: Path, name: str, table: pd.DataFrame, plot: Plot) -> None:
    """Write a table to NAME.csv, and how to plot it to NAME.json."""
    path = directory / f"{name}.csv"
    assert not path.exists(), f"two tables with the same name: {path}"
    for column in plot.columns:
        assert column in table.columns, f"{path} has the columns {', '.join(table.columns)}, not {column}"
    directory.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    write_json(directory / f"{name}.json", asdict(plot))


def write_table(directory: Path, name: str, table: pd.DataFrame, title: str) -> None:
    """Write a table for people to NAME.csv, and its title to NAME.json."""
    path = directory / f"{name}.csv"
    assert not path.exists(), f"two tables with the same name: {path}"
    directory.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    write_json(directory / f"{name}.json", {"title": title})


@contextmanager
def picture(path: Path, width: float, height: float, **panels: Any) -> Iterator[Any]:
    """Yield axes to plot on (`panels`: arguments of matplotlib's Figure.subplots), then write the picture.

    Sizes are in inches. An .svg has the same bytes every time. `$` in names, which users choose, starts no formula.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "arriero"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(**panels)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
