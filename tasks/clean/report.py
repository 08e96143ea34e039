"""Report what `clean` did: counts by source and rule, and the funnel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.clean.partition import Part
from tasks.clean.personal_data import TYPES
from tasks.running.names import metric_name
from tasks.running.plots import Plot, picture

if TYPE_CHECKING:
    import pandas as pd

FUNNEL = Plot(
    kind="steps",
    title="Documents left after each rule",
    x="after",
    y="share",
    x_label="rule",
    y_label="share of documents",
    series="source",
)
# Groups of rules in the order in which they are applied, by prefixes of the rules' names.
STEPS = {
    "language": ("empty", "language"),
    "C4": ("c4_",),
    "Gopher": ("gopher_",),
    "duplicate": ("duplicate",),
    "near-duplicate": ("near_duplicate",),
    "personal data": ("personal_data",),
}


def metrics(counts: pd.DataFrame, parts: Sequence[Part]) -> dict[str, float]:
    """Return figures of the whole corpus, then of each source under `<source>/`.

    `counts` has one row per source and rule.
    """
    figures = _figures(counts, parts)
    for source, own in counts.groupby("source", sort=True):
        own_parts = [part for part in parts if part.source == source]
        figures |= {f"{metric_name(str(source))}/{name}": value for name, value in _figures(own, own_parts).items()}
    return figures


def _figures(counts: pd.DataFrame, parts: Sequence[Part]) -> dict[str, float]:
    kept = counts[counts["rule"] == ""]
    by_rule = counts[counts["rule"] != ""].groupby("rule")["num_documents"].sum()
    return {
        "documents_read": int(counts["num_documents"].sum()),
        "documents_kept": int(kept["num_documents"].sum()),
        "rows_malformed": sum(part.num_malformed for part in parts),
        "characters_read": int(counts["num_characters_read"].sum()),
        "characters_kept": int(kept["num_characters"].sum()),
        "documents_repaired": int(kept["repaired"].sum()),
        "lines_dropped": int(kept["num_lines_dropped"].sum()),
        **{f"masked_{kind}": int(kept[f"masked_{kind}"].sum()) for kind in TYPES},
        **{f"rejected_{rule}": int(number) for rule, number in by_rule.items()},
    }


def funnel_of(counts: pd.DataFrame, sources: Sequence[str]) -> pd.DataFrame:
    """Return how many documents of each source are left after each step: source, after, documents, share."""
    import pandas as pd

    rows = []
    for source in sources:
        own = counts[counts["source"] == source]
        left = total = int(own["num_documents"].sum())
        rows.append((source, "read", left, 1.0))
        for step, beginnings in STEPS.items():
            left -= int(own.loc[own["rule"].str.startswith(beginnings), "num_documents"].sum())
            rows.append((source, step, left, round(left / max(total, 1), 6)))
    return pd.DataFrame(rows, columns=["source", "after", "documents", "share"])


def plot_funnel(funnel: pd.DataFrame, path: Path) -> None:
    """Plot the share of each source's documents that is left after each step."""
    with picture(path, 9, 5) as axes:
        for source, own in funnel.groupby("source", sort=False):
            axes.plot(own["after"], own["share"], marker="o", label=f"{source} ({own['documents'].iloc[0]:,} read)")
        axes.set(xlabel="after", ylabel="share of documents left", ylim=(0, 1.02), title="Cleaning the corpus")
        axes.legend(fontsize="small")
