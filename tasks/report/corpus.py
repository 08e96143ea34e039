"""The paper's findings about the corpus and about pretraining, asked of this run's tables."""

from __future__ import annotations

import math

from tasks.report.charts import Chart, Series
from tasks.report.evidence import Effect, Evidence, Finding, of_shares
from tasks.report.outputs import NotRun, Outputs

LAST_PART = 0.25  # of pretraining, in which the loss must still fall


def pronouns(outputs: Outputs) -> Evidence:
    """Compare the shares of documents with each pronoun group."""
    table = outputs.table("audit", "", "plots/pronouns.csv")
    counts = dict(zip(table["group"], table["documents"], strict=True))
    if not {"he", "she"} <= set(counts):
        raise NotRun("not measured: no document has a pronoun of these groups")
    total = int(outputs.figures("audit")["documents"])
    effect = of_shares("documents with “he” minus documents with “she”", counts["he"], total, counts["she"], total)
    shown = table[~table["group"].str.startswith("any")]
    chart = Chart(
        "Share of the documents with each group of pronouns", "pronouns", "documents",
        [Series("documents", shown["group"].tolist(), shown["share"].tolist())], percent=True, joined=False,
    )  # fmt: skip
    return Evidence([effect], chart, "Its interval treats the two groups as if they stood in different documents.")


def saturation(outputs: Outputs) -> Evidence:
    """Fit a line to the training loss against log2 of the tokens, in the last part of pretraining."""
    from scipy.stats import linregress, t  # type: ignore[import-untyped,unused-ignore]

    table = outputs.table("pretrain", "", "plots/train.csv")
    last = table[table["tokens"] >= (1 - LAST_PART) * table["tokens"].max()]
    if len(last) < 3:
        raise NotRun("not measured: the training is too short to fit a line to its end")
    line = linregress([math.log2(tokens) for tokens in last["tokens"]], last["loss"])
    reach = float(t.ppf(0.975, len(last) - 2)) * line.stderr
    words = f"fall of the training loss for each doubling of the tokens, in the last {LAST_PART:.0%} of them, nats"
    effect = Effect(words, -line.slope, -line.slope - reach, -line.slope + reach)
    every = max(1, len(table) // 200)
    chart = Chart(
        "Training loss of pretraining", "tokens", "nats per token",
        [Series("training", table["tokens"][::every].tolist(), table["loss"][::every].tolist())],
    )  # fmt: skip
    return Evidence([effect], chart, "The learning rate falls meanwhile, which lowers the loss by itself.")


FINDINGS = [
    Finding(
        "pronouns", "“He” is more frequent than “she”", "section 4.1, table 9", "audit",
        "In the paper's corpus 51% of the documents with such pronouns say “he”, 28% “she”.", pronouns,
    ),
    Finding(
        "saturation", "The loss has not levelled out", "section 2.2.2, figure 5", "pretrain",
        "After two trillion tokens no model shows a sign of saturation.", saturation,
    ),
]  # fmt: skip
