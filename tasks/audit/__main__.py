"""Audit of the cleaned corpus: pronouns, demographic identities, toxicity, languages (Llama 2, section 4.1).

Reads data/clean/documents, the list of demographic terms, and the labelled sentences that the toxicity classifier is
trained on. Goes through the corpus twice: first it counts mentions and languages, and draws the ordinary sentences
that the classifier needs; then it scores the documents.

Writes data/audit/tables/*.csv (also MLflow's tables), data/audit/plots/*.csv (for `dvc plots`),
data/audit/classifier/classifier.skops (when trained here) and, for MLflow, pictures.
"""

from __future__ import annotations

import heapq
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.audit import mentions, pictures, report, toxicity
from tasks.audit.corpus import DOCUMENTS, Counts, find_parts, over_parts
from tasks.audit.toxicity import Classifier
from tasks.running.params import Section
from tasks.running.places import NOTHING
from tasks.running.stage import Stage, start
from tasks.workers.cluster import dask_client


class Toxicity(Section):
    """How documents are scored."""

    languages: list[str] = Field(min_length=1, description="the classifier's languages; only such documents are scored")
    sample: float = Field(gt=0, le=1, description="share of these documents that are scored")
    threshold: float = Field(gt=0, lt=1, description="score at which a document or a window counts as toxic")
    num_bins: int = Field(gt=1, le=100, description="bins of the histogram of scores")
    window_words: int = Field(gt=0, description="longest piece of a sentence that is scored at once, in words")


class Params(Section):
    """What the corpus is audited for."""

    terms: str = Field(min_length=1, description="CSV file of demographic terms: axis,term,other_forms,other_meanings")
    num_top_terms: int = Field(gt=0, description="terms of each axis that the plots show")
    num_languages: int = Field(gt=0, description="languages that the picture shows")
    batch_documents: int = Field(gt=0, description="documents that a worker holds in memory at once")
    toxicity: Toxicity
    classifier: Classifier


def run(stage: Stage[Params]) -> dict[str, float]:
    """Audit the corpus and return the shares, over all sources and for each."""
    params = stage.params
    terms = mentions.read_terms(Path(params.terms))
    texts, labels = toxicity.read_labelled(Path(params.classifier.labels))
    if Path(params.classifier.path) != NOTHING:
        toxicity.check_loaded(params.classifier)
    parts = find_parts(DOCUMENTS)
    started = time.monotonic()
    with dask_client(stage.machine, stage.scratch, len(parts)) as client:
        counts, background = count(stage, client, parts, terms)
        score, quality = make_classifier(stage, texts, labels, background)
        counts += score_documents(stage, client, parts, score)
    counts = report.add_up(counts)
    seconds = time.monotonic() - started
    stage.log({"documents_per_second": counts["all", "documents", ""] / seconds, "seconds": seconds}, step=0)

    tables = report.tabulate(counts, terms, params.toxicity.num_bins)
    for directory in (stage.output / "tables", stage.tables):
        directory.mkdir(exist_ok=True)
        for name, table in tables.items():
            table.to_csv(directory / f"{name}.csv", index=False)
    plotted = {**tables, "identity_terms": report.top_terms(tables["identity_terms"], params.num_top_terms)}
    report.write_plots(stage, plotted)
    auc = "AUC {classifier_auc:.3f} ({classifier_auc_low:.3f} to {classifier_auc_high:.3f})".format(**quality)
    pictures.plot_pictures(plotted, params.toxicity.threshold, auc, params.num_languages, stage.artifacts)
    return report.figures(counts, tables) | {f"toxicity/{name}": value for name, value in quality.items()}


def count(stage: Stage[Params], client: Any, parts: list[Path], terms: list[mentions.Term]) -> tuple[Counts, list[str]]:
    """Return the counts of all parts except toxicity, and the sentences drawn as the classifier's background.

    Raises ValueError when the corpus has no documents.
    """
    params = stage.params
    num_background = params.classifier.num_background if Path(params.classifier.path) == NOTHING else 0
    shared = mentions.Counting(
        lexicon=mentions.build_lexicon(terms),
        batch_documents=params.batch_documents,
        background_languages=tuple(params.toxicity.languages),
        num_background=num_background,
        window_words=params.toxicity.window_words,
        seed=stage.seed,
    )
    counts: Counts = Counts()
    drawn: list[tuple[float, str]] = []
    for part_counts, part_drawn in over_parts(client, mentions.count_part, parts, shared, stage.scratch / "counting"):
        counts += part_counts
        drawn = heapq.nsmallest(num_background, drawn + part_drawn)
    if not counts:
        raise ValueError(f"{DOCUMENTS} holds no documents: data/clean/rejected says which rule rejected each")
    return counts, [text for _, text in drawn]


def make_classifier(
    stage: Stage[Params], texts: list[str], labels: toxicity.Integers, background: list[str]
) -> tuple[toxicity.Score, dict[str, float]]:
    """Return the function that scores texts, and its figures on labelled sentences that it was not trained on."""
    params = stage.params.classifier
    if Path(params.path) != NOTHING:
        score: toxicity.Score = partial(
            toxicity.score_loaded,
            path=str(Path(params.path).resolve()),
            toxic_label=params.toxic_label,
            batch_size=params.batch_size,
        )
        held_out = score(texts)
    else:
        known = {toxicity.key(text) for text in texts}
        # a labelled sentence must not be in the background too: that would undo the hold-out
        background = [text for text in background if toxicity.key(text) not in known]
        held_out = toxicity.cross_validate(texts, labels, background, params, stage.seed)
        model = toxicity.train(texts, labels, background, params, stage.seed)
        toxicity.save_classifier(model, stage.output / "classifier" / "classifier.skops")
        score = partial(toxicity.score_trained, model=model)
    quality = toxicity.assess(labels, held_out)
    return score, quality | {"classifier_sentences": len(texts), "classifier_background": len(background)}


def score_documents(stage: Stage[Params], client: Any, parts: list[Path], score: toxicity.Score) -> Counts:
    """Return how many documents of all parts have which toxicity score."""
    params = stage.params
    shared = toxicity.Scoring(
        score=score,
        languages=tuple(params.toxicity.languages),
        sample=params.toxicity.sample,
        threshold=params.toxicity.threshold,
        num_bins=params.toxicity.num_bins,
        window_words=params.toxicity.window_words,
        batch_documents=params.batch_documents,
        seed=stage.seed,
    )
    counts: Counts = Counts()
    for part_counts, _ in over_parts(client, toxicity.score_part, parts, shared, stage.scratch / "scoring"):
        counts += part_counts
    return counts


if __name__ == "__main__":
    start(Params, run)
