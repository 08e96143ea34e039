"""What the audit found, as tables, metrics, files for `dvc plots` and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks.audit.corpus import EVERYWHERE, Counts
from tasks.audit.mentions import PRONOUNS, Term
from tasks.running.names import metric_name
from tasks.running.plots import Plot
from tasks.running.stage import Stage

if TYPE_CHECKING:
    import pandas as pd

KIND_OF = {group: kind for kind, groups in PRONOUNS.items() for group in (*groups, f"any_{kind}")}
ALL_DOCUMENTS = ("documents", "")
SCORED_DOCUMENTS = ("toxicity", "scored")
PLOTTED = {  # tables of shares -> the column that names what a bar stands for
    "pronouns": "group",
    "identities": "axis",
    "identity_terms": "term",
    "toxicity": "measure",
    "toxicity_histogram": "score",
    "languages": "language",
}
OF_DOCUMENTS, OF_SCORED = "share of documents", "share of the documents scored"
PLOTS = {  # those that the report shows
    "pronouns": Plot("bars", "Pronouns, all sources", "share", "group", OF_DOCUMENTS, "pronoun group"),
    "identities": Plot("bars", "Demographic identities by axis, all sources", "share", "axis", OF_DOCUMENTS, "axis"),
    "identity_terms": Plot(
        "bars", "Most frequent demographic terms, all sources", "share", "term", OF_DOCUMENTS, "term"
    ),
    "toxicity_histogram": Plot(
        "bars", "Toxicity scores of documents, all sources", "share", "score", OF_SCORED, "score from"
    ),
    "toxicity_by_source": Plot(
        "bars", "Toxic documents (mean, any window) by source", "share", "bar", OF_SCORED, "source and measure"
    ),
    "languages": Plot("bars", "Languages, all sources", "share", "language", OF_DOCUMENTS, "language"),
}


def add_up(counts: Counts) -> Counts:
    """Return the counts, with those of all sources together added under the source `all`."""
    total = Counts(counts)
    for (_, measure, name), number in counts.items():
        total[EVERYWHERE, measure, name] += number
    return total


def shares(
    counts: Counts, measure: str, names: Iterable[str], column: str, of: tuple[str, str] = ALL_DOCUMENTS
) -> pd.DataFrame:
    """Return the columns source, `column` (the name), documents, share: `all` first, then sources by size.

    A source whose denominator `of` is zero has no rows: its share is undefined.
    """
    import pandas as pd

    sizes = {source: number for (source, counted, _), number in counts.items() if counted == "documents"}
    sources = sorted(sizes, key=lambda source: (source != EVERYWHERE, -sizes[source], source))
    rows = [
        (source, name, counts[source, measure, name], counts[source, measure, name] / counts[source, *of])
        for source in sources
        if counts[source, *of]
        for name in names
    ]
    return pd.DataFrame(rows, columns=["source", column, "documents", "share"])


def tabulate(counts: Counts, terms: list[Term], num_bins: int) -> dict[str, pd.DataFrame]:
    """Return the audit's tables by name, from counts that hold their sum.

    `share_of_group` is the share among the documents that mention anything of the kind or axis: the paper's table 9
    gives pronouns and terms this way, and axes as shares of all documents.
    """
    pronouns = shares(counts, "pronouns", KIND_OF, "group")
    pronouns.insert(1, "kind", pronouns["group"].map(KIND_OF))
    pronouns["share_of_group"] = _share_of(counts, pronouns, "pronouns", "any_" + pronouns["kind"])

    by_name = {f"{term.axis}/{term.term}": term for term in terms}
    mentions = shares(counts, "terms", by_name, "term")
    mentions = mentions[mentions["documents"] > 0]
    mentions.insert(1, "axis", mentions["term"].map(lambda name: by_name[name].axis))
    mentions["other_meanings"] = mentions["term"].map(lambda name: by_name[name].other_meanings)
    mentions["term"] = mentions["term"].map(lambda name: by_name[name].term)
    mentions.insert(5, "share_of_group", _share_of(counts, mentions, "identities", mentions["axis"]))

    histogram = shares(counts, "histogram", map(str, range(num_bins)), "score", SCORED_DOCUMENTS)
    histogram["score"] = histogram["score"].map(lambda number: f"{int(number) / num_bins:.2f}")

    languages = shares(counts, "languages", sorted({name for _, of, name in counts if of == "languages"}), "language")
    return {
        "pronouns": pronouns,
        "identities": shares(counts, "identities", sorted({term.axis for term in terms}), "axis"),
        "identity_terms": _most_first(mentions, ["source", "axis"]),
        "toxicity": shares(counts, "toxicity", ("toxic", "any_window"), "measure", SCORED_DOCUMENTS),
        "toxicity_histogram": histogram,
        "languages": _most_first(languages[languages["documents"] > 0], ["source"]),
    }


def _share_of(counts: Counts, table: pd.DataFrame, measure: str, groups_of_rows: pd.Series[str]) -> list[float]:
    groups = zip(table["source"], groups_of_rows, table["documents"], strict=True)
    return [number / max(1, counts[source, measure, group]) for source, group, number in groups]


def _most_first(table: pd.DataFrame, within: list[str]) -> pd.DataFrame:
    """Sort by share within the groups, which keep their order."""
    groups = [group for _, group in table.groupby(within, sort=False)]
    import pandas as pd

    ordered = [group.sort_values("documents", ascending=False, kind="stable") for group in groups]
    return pd.concat(ordered, ignore_index=True) if ordered else table


def figures(counts: Counts, tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Return the metrics: over all sources, and under `source/<source>/` for each."""
    result: dict[str, float] = {}
    for source in tables["pronouns"]["source"].unique():
        result[f"{_prefix(source)}documents"] = counts[source, *ALL_DOCUMENTS]
        result[f"{_prefix(source)}toxicity/documents_scored"] = counts[source, *SCORED_DOCUMENTS]
    for name in ("pronouns", "identities", "languages"):
        table = tables[name]
        for source, group, share in zip(table["source"], table[PLOTTED[name]], table["share"], strict=True):
            result[f"{_prefix(source)}{name}/{metric_name(group)}"] = share
    toxicity = tables["toxicity"]
    for source, measure, share in zip(toxicity["source"], toxicity["measure"], toxicity["share"], strict=True):
        result[f"{_prefix(source)}toxicity/share{'' if measure == 'toxic' else '_any_window'}"] = share
    return dict(sorted(result.items()))


def _prefix(source: str) -> str:
    return "" if source == EVERYWHERE else f"source/{metric_name(source)}/"


def top_terms(mentions: pd.DataFrame, number: int) -> pd.DataFrame:
    """Return the first `number` terms of each axis in each source."""
    return mentions.groupby(["source", "axis"], sort=False).head(number)


def write_plots(stage: Stage[Any], tables: dict[str, pd.DataFrame]) -> None:
    """Write plots/NAME.csv over all sources, and plots/NAME_by_source.csv, whose `bar` combines source and name."""
    for name, column in PLOTTED.items():
        table = tables[name]
        everywhere = table["source"] == EVERYWHERE
        by_source = table[~everywhere]
        bar = by_source["source"] + ": " + by_source[column]
        parts = {name: table[everywhere].drop(columns="source"), f"{name}_by_source": by_source.assign(bar=bar)}
        for part, contents in parts.items():
            if part in PLOTS:
                stage.plot(part, contents, PLOTS[part])
            else:
                contents.to_csv(stage.output / "plots" / f"{part}.csv", index=False)
