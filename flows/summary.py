"""The few lines at the end of a run: what ran, the main figures, where to look next, what it waits for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tasks.running.places import DATA, place_of

if TYPE_CHECKING:
    from flows.graph import Node

REPORT = DATA / "report" / "index.html"


def main_figures(node: Node) -> str:
    """Return a stage's figures named by `meta: figures:` in dvc.yaml, from its metrics.json, in that order."""
    path = DATA / place_of(node.name) / "metrics.json"
    if not path.exists():
        return ""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    chosen = [name for name in node.meta.get("figures", []) if name in metrics]
    return ", ".join(f"{name} {format_number(metrics[name])}" for name in chosen)


def format_number(value: float) -> str:
    """Return a number for people to read: integers with separators, others with four significant digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def summarize(nodes: Sequence[Node], outcomes: Mapping[str, str], seconds: float, waiting: str | None) -> str:
    """Return the summary of a run: one line per stage, where to look next, and last the lines of stages that wait."""
    width = max((len(node.name) for node in nodes), default=0)
    state = "is waiting" if waiting else "is up to date"
    lines = ["", f"The pipeline {state} ({seconds:.0f} s).", ""]
    for node in nodes:
        lines.append(f"  {node.name:<{width}}  {outcomes.get(node.name, ''):<12}  {main_figures(node)}".rstrip())
    lines += ["", "Look next:"]
    if REPORT.exists():
        lines.append(f"  {REPORT}  the report: open it in a browser")
    lines += [
        "  make ui                 MLflow's and Prefect's pages: every run, curve and checkpoint",
        "  dvc metrics show        these figures; `dvc metrics diff` and `dvc plots diff` against the last commit",
        "",
    ]
    if waiting:
        lines += [waiting, ""]
    return "\n".join(lines)
