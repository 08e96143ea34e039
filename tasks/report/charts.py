"""Charts as SVG inside the page: colours that all can tell apart, on light and dark ground, and words instead of them.

Colours are Okabe and Ito's (2008), as variables of the page's style sheet, so that each ground has its own shade; each
series has its own marker and dashes, too. Words are set in the reader's font.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tasks.running.plots import picture

INK, LINE = "#010101", "#020202"  # stand for the page's colours until the SVG is written
SERIES = tuple(f"#0a0a{number:02d}" for number in range(1, 8))
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
}


class Series(NamedTuple):
    """One curve: numbers or words across, numbers up, their intervals if there are any, and words beside the points."""

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    labels: Sequence[str] | None = None


class Chart(NamedTuple):
    """A chart; `level`: where there is no effect; `joined`: whether lines join the points; `log`: powers of 2."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    percent: bool = False
    level: float | None = None
    joined: bool = True
    log: bool = False


def draw(chart: Chart, path: Path, size: tuple[float, float], name: str) -> str:
    """Return a chart as SVG; it is first written to `path`.

    `size` is in inches; `name`, unique on the page, begins its ids. The title is what is read aloud.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE), picture(path, *size) as axes:
        draw_chart(axes, chart)
    return inline(path.read_text(encoding="utf-8"), name, chart.title)


def draw_chart(axes: Any, chart: Chart) -> None:
    """Draw one chart: words across stand in the order in which they first come, series beside each other."""
    import matplotlib.ticker

    words = list(dict.fromkeys(x for series in chart.series for x in series.x if isinstance(x, str)))
    for number, series in enumerate(chart.series):
        shift = 0.12 * (number - (len(chart.series) - 1) / 2) if words else 0.0
        across = [words.index(x) + shift if words else float(x) for x in series.x]
        look: dict[str, Any] = {
            "color": SERIES[number % len(SERIES)],
            "marker": MARKERS[number % len(MARKERS)] if len(across) <= 24 else "",
            "linestyle": DASHES[number % len(DASHES)] if chart.joined else "none",
            "markersize": 4.5,
            "linewidth": 1.4,
            "label": series.name,
        }
        reach = reach_of(series)
        if reach is None:
            axes.plot(across, series.y, **look)
        else:
            axes.errorbar(across, series.y, reach, capsize=2.5, elinewidth=1, **look)
        for x, y, label in zip(across, series.y, series.labels or [], strict=bool(series.labels)):
            axes.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if chart.level is not None:
        axes.axhline(chart.level, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    if words:
        shown = [textwrap.fill(word.replace("_", " "), 13, break_long_words=False) for word in words]
        crowded = len(words) * max(len(line) for word in shown for line in word.splitlines()) > 64
        if crowded:
            axes.set_xticks(range(len(words)), words, rotation=30, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(range(len(words)), shown)
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif chart.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
    else:
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(short))
    if chart.percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(percent))
    if any(series.labels for series in chart.series):
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(percent))
        axes.margins(0.15)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.5, linewidth=0.6)
    if len(chart.series) > 1:
        columns = 1 if max(len(series.name) for series in chart.series) > 24 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=2.8)


def reach_of(series: Series) -> list[list[float]] | None:
    """Return how far the intervals reach below and above the points; None if the series has none."""
    if series.low is None or series.high is None:
        return None
    below = [0.0 if low is None else max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
    above = [0.0 if high is None else max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]
    return [below, above]


def short(value: float, _position: int) -> str:
    """Return a tick's number, thousands and millions as `k` and `M`."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def percent(value: float, _position: int) -> str:
    """Return a tick's share in percent, without zeros that say nothing."""
    return f"{100 * value:.3g}%"


def inline(svg: str, name: str, alternative: str) -> str:
    """Return what matplotlib wrote as an element of the page, in the page's colours and font.

    Ids are made unique; those that nothing refers to are left out, as are the size, which the page sets, and metadata.
    """
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for number, colour in enumerate(SERIES, 1):
        svg = svg.replace(colour, f"var(--series-{number})")
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    # text without a colour of its own is black, which can't be read on dark ground
    svg = re.sub(r'<text style="(?![^"]*fill)', '<text style="fill: currentColor; ', svg)
    size = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"|( height="[\d.]+pt")| width="[\d.]+pt"')
    head, close, body = svg.partition(">")
    return f'{size.sub("", head)} role="img" aria-label="{escape(alternative)}"{close}{body}'
