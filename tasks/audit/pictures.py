"""Pictures of the audit's tables, for MLflow: bars over all sources, and a map of the shares by source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.audit.corpus import EVERYWHERE
from tasks.running.plots import picture

if TYPE_CHECKING:
    import pandas as pd

BAR = "#4472a8"
TOXIC = "#b5483a"


def plot_pictures(
    tables: dict[str, pd.DataFrame], threshold: float, auc: str, num_languages: int, directory: Path
) -> None:
    """Plot pronouns.png, identities.png, identity_terms.png, languages.png and toxicity.png."""
    pronouns, identities, languages = (tables[name] for name in ("pronouns", "identities", "languages"))
    _plot_shares(pronouns, "group", "Documents that contain a pronoun of the group", directory / "pronouns.png")
    _plot_shares(identities, "axis", "Documents that mention an identity of the axis", directory / "identities.png")
    everywhere = languages[languages["source"] == EVERYWHERE]["language"]
    title = "Documents by language"
    if len(everywhere) > num_languages:
        title += f", the {num_languages} most frequent of {len(everywhere)}"
    shown = languages[languages["language"].isin(everywhere[:num_languages])]
    _plot_shares(shown, "language", title, directory / "languages.png")
    _plot_terms(tables["identity_terms"], directory / "identity_terms.png")
    if len(tables["toxicity"]):
        _plot_toxicity(tables["toxicity_histogram"], tables["toxicity"], threshold, auc, directory / "toxicity.png")


def _label(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float) -> str:
    """Format a share in percent, with at most three digits; a tiny share is distinguished from 0."""
    percent = 100 * share
    if percent == 0:
        return "0"
    return "<0.01" if percent < 0.01 else f"{percent:.2f}" if percent < 1 else f"{percent:.1f}"


def _bars(axes: Any, names: list[str], shares: list[float], colour: str = BAR) -> None:
    """Draw horizontal bars in percent, the first on top, each with its value."""
    positions = np.arange(len(names))
    axes.barh(positions, [100 * share for share in shares], color=colour)
    axes.set_yticks(positions, [_label(name) for name in names])
    axes.invert_yaxis()
    for position, share in zip(positions, shares, strict=True):
        axes.annotate(_percent(share), (100 * share, position), (3, 0), textcoords="offset points", va="center", size=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_shares(table: pd.DataFrame, column: str, title: str, path: Path) -> None:
    """Plot sorted bars over all sources; beside them, in the same order, the shares of each source."""
    everywhere = table[table["source"] == EVERYWHERE].sort_values("share", ascending=False, kind="stable")
    names = everywhere[column].tolist()
    sources = [source for source in table["source"].drop_duplicates() if source != EVERYWHERE]
    percent_NS = 100 * (  # N names, S sources
        table.pivot_table(index=column, columns="source", values="share", observed=False)
        .reindex(index=names, columns=sources)
        .fillna(0.0)
        .to_numpy()
    )
    size = (6.5 + 0.75 * len(sources), 1.9 + 0.32 * len(names))
    with picture(path, *size, ncols=2, width_ratios=(4, 0.5 + 0.75 * len(sources))) as (left, right):
        _bars(left, names, everywhere["share"].tolist())
        left.set(xlabel="% of all documents", title="all sources")
        image = right.imshow(percent_NS, cmap="Blues", aspect="auto", vmin=0)
        right.set_xticks(range(len(sources)), sources, rotation=40, ha="right")
        right.set_yticks([])
        right.set_title("by source, % of its documents")
        for (row, place), percent in np.ndenumerate(percent_NS):
            colour = "white" if percent > 0.6 * percent_NS.max() else "black"
            right.text(place, row, _percent(percent / 100), ha="center", va="center", size=8, color=colour)
        image.set_clim(0, max(float(percent_NS.max()), 1e-9))
        left.figure.suptitle(title)


def _plot_terms(terms: pd.DataFrame, path: Path) -> None:
    """Plot the top terms of each axis over all sources; a star marks those that have other meanings too."""
    everywhere = terms[terms["source"] == EVERYWHERE]
    groups = list(everywhere.groupby("axis", sort=False))
    heights = [len(group) + 1.5 for _, group in groups]
    shape = {"nrows": max(1, len(groups)), "height_ratios": heights or None, "squeeze": False}
    with picture(path, 10, 1.6 + 0.27 * len(everywhere), **shape) as panels:
        for panel, (axis, group) in zip(panels[:, 0], groups, strict=False):
            stars = [
                f"{term} *" if other else term
                for term, other in zip(group["term"], group["other_meanings"], strict=True)
            ]
            _bars(panel, stars, group["share"].tolist())
            panel.set_title(_label(str(axis)), loc="left", size=10)
        panels[-1, 0].set_xlabel("% of all documents; * the word has other meanings too (table identity_terms)")
        panels[0, 0].figure.suptitle("Most frequent terms of each demographic axis")


def _plot_toxicity(histogram: pd.DataFrame, toxicity: pd.DataFrame, threshold: float, auc: str, path: Path) -> None:
    """Plot the histogram of document scores on a logarithmic scale, and each source's share above the threshold."""
    everywhere = histogram[histogram["source"] == EVERYWHERE]
    starts = everywhere["score"].astype(float).to_numpy()
    width = 1 / len(starts)
    toxic = toxicity[toxicity["measure"] == "toxic"]
    any_window = toxicity[toxicity["measure"] == "any_window"]
    positions = np.arange(len(toxic))
    colours = [TOXIC if start + width / 2 >= threshold else BAR for start in starts]
    with picture(path, 11, 1.9 + max(2.6, 0.5 * len(toxic)), ncols=2) as (left, right):
        left.bar(
            starts, 100 * everywhere["share"], width, align="edge", color=colours, edgecolor="white", linewidth=0.5
        )
        left.axvline(threshold, color="black", linestyle="--", linewidth=1)
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")  # the log scale's own formatter writes powers of ten
        left.yaxis.set_minor_formatter("")
        left.set(
            xlim=(0, 1), xlabel="score of the document: mean of its sentences", ylabel="% of the documents scored (log)"
        )
        left.set_title(f"all sources (dashed: toxic from {threshold:g})", size=10)
        left.spines[["top", "right"]].set_visible(False)
        for offset, table, colour, label in (
            (-0.2, any_window, "#c9c9c9", "any sentence"),
            (0.2, toxic, TOXIC, "mean of the sentences"),
        ):
            right.barh(positions + offset, 100 * table["share"], 0.4, color=colour, label=f"{label} ≥ {threshold:g}")
            for position, share in zip(positions, table["share"], strict=True):
                place = (100 * share, position + offset)
                right.annotate(_percent(share), place, (3, 0), textcoords="offset points", va="center", size=8)
        right.set_yticks(positions, toxic["source"])
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set_xlabel("% of the documents scored")
        right.set_title("by source", size=10)
        right.spines[["top", "right"]].set_visible(False)
        left.figure.legend(loc="outside lower right", ncols=2, frameon=False)
        left.figure.suptitle(f"Toxicity; the classifier's own {auc}")
