"""The stages in order: what each did, which of its plots say something, and all its tables, folded.

The words are templates: what stands in braces is a figure of the stage's metrics.json (of its last round), `entries`
the number of its rounds or checkpoints. A sentence whose figures the run doesn't have is left out.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.report.charts import SERIES, Chart, Series
from tasks.running.plots import Plot

if TYPE_CHECKING:
    import pandas as pd

MAX_SERIES = len(SERIES)
Drawn = tuple[str, Plot, "pd.DataFrame"]  # name, declaration and points: columns title, x, y, series


class Chapter(NamedTuple):
    """What is said of a stage of the recipe, and the plots that are drawn; its others are tables."""

    title: str
    did: Sequence[str]
    plots: Sequence[str] = ()


CHAPTERS: Mapping[str, Chapter] = {
    "world": Chapter(
        "The world: texts, prompts and people with a known truth",
        ["A small closed world was written, so that every later claim can be checked against what is true in it.",
         "Its corpus has {documents:,} documents, some dirty on purpose."],
    ),
    "clean": Chapter(
        "Cleaning the corpus",
        ["Broken text was repaired, other languages, poor text, duplicates and personal data taken out.",
         "{documents_kept:,} of {documents_read:,} documents stayed.",
         "Of the duplicates that were planted, {duplicates_recall:.0%} were found, of the e-mail addresses "
         "{email_recall:.0%}."],
        ["funnel"],
    ),
    "audit": Chapter(
        "Auditing the corpus",
        ["Who is spoken of, and how, was counted, not scrubbed.",
         "{toxicity/share:.1%} of {documents:,} documents are toxic by the classifier."],
    ),
    "train_tokenizer": Chapter(
        "Training the tokenizer",
        ["SentencePiece BPE with digits apart and bytes for what it does not know: {vocab_size:,} tokens, "
         "{characters_per_token:.2f} characters each (paper: 32,000 tokens)."],
    ),
    "tokenize": Chapter(
        "Mixing the sources",
        ["{tokens:,} tokens were drawn from the sources by their weights (paper: 2 trillion)."],
        ["mixture"],
    ),
    "pretrain": Chapter(
        "Pretraining",
        ["A model of {parameters:,} parameters read {tokens:,} tokens in {steps:,} steps.",
         "Its perplexity on held-out text is {validation/all/perplexity:.2f}."],
    ),
    "sft": Chapter(
        "Supervised fine-tuning",
        ["The model learnt {dialogues:,} demonstrations, the loss on answers only (paper: 27,540, two epochs).",
         "Its held-out loss is {validation/all/loss:.3f}."],
        ["validation"],
    ),
    "responses": Chapter(
        "Answers for the annotators",
        ["For each of {entries} batches, two model variants answered the same prompts at different temperatures.",
         "The last batch has {helpfulness/pairs:,} pairs about helpfulness and {safety/pairs:,} about safety."],
    ),
    "preferences": Chapter(
        "Preferences of people",
        ["In {entries} batches annotators chose the better of two answers, and said by how much.",
         "The last reward models could learn from {train:,} pairs; {validation:,} are held out."],
    ),
    "reward_helpfulness": Chapter(
        "Reward model: helpfulness",
        ["In each of {entries} rounds a helpfulness model was trained on all pairs so far.",
         "The last one gets {helpfulness/accuracy:.1%} of the held-out helpfulness pairs right "
         "({helpfulness/accuracy/low:.1%} to {helpfulness/accuracy/high:.1%})."],
    ),
    "reward_safety": Chapter(
        "Reward model: safety",
        ["In each of {entries} rounds a safety model was trained, with a second loss that tells safe from unsafe.",
         "The last one gets {safety/accuracy:.1%} of the held-out safety pairs right "
         "({safety/accuracy/low:.1%} to {safety/accuracy/high:.1%})."],
        ["scores"],
    ),
    "rejection_sampling": Chapter(
        "Rejection sampling",
        ["In each of {entries} rounds the newest model answered every prompt several times, and the best answer by "
         "the reward models was kept.",
         "With all earlier rounds' the last one gives {dialogues:,} dialogues to learn."],
    ),
    "ghost_attention": Chapter(
        "Ghost Attention",
        ["Conversations were played with an instruction in every turn; what is learnt has it in the first one only.",
         "The last round gives {dialogues:,} dialogues, in whose turns the instruction holds {held:.1%} of the time."],
    ),
    "context_distillation": Chapter(
        "Safety context distillation",
        ["Attacks were answered under a safety pre-prompt; where the safety model scores that higher, it is learnt "
         "without the pre-prompt.",
         "{kept:,} of {prompts:,} prompts were kept."],
        ["kept"],
    ),
    "fine_tuning": Chapter(
        "The versions: fine-tuning on the best answers",
        ["Each of {entries} versions learnt the best answers of its round and of all before, beside demonstrations.",
         "The last one learnt {dialogues:,} dialogues in {steps:,} steps."],
        ["validation"],
    ),
    "controls": Chapter(
        "Controls: the same trainings with one thing left out",
        ["{entries} controls tell what a version owes to its samples, its rounds, its distillation, and what merely to "
         "more training (the paper has none)."],
    ),
    "ppo": Chapter(
        "Proximal policy optimisation",
        ["The last version went on by PPO: {iterations:,} iterations, the best by held-out prompts was number "
         "{best_iteration:,} (paper: 200 to 400).",
         "Its held-out reward rose by {validation/gain:.3f}, at {validation/kl:.3f} nats from its start."],
        ["held_out"],
    ),
    "reward_drift": Chapter(
        "Old reward models on new answers",
        ["Reward models of {entries} earlier rounds scored the pairs of the next batch."],
    ),
    "conversations": Chapter(
        "Long conversations",
        ["{entries} checkpoints played {conversations:,} conversations of many turns under an instruction."],
    ),
    "consistency": Chapter(
        "Keeping to an instruction",
        ["Each answer of those conversations was judged by whether it keeps to the instruction."],
    ),
    "evaluate": Chapter(
        "Evaluation",
        ["{entries} checkpoints answered {prompts:,} prompts: helpful, adversarial and borderline ones, and "
         "instructions."],
    ),
    "multi_turn": Chapter(
        "Prompts of several turns",
        ["Dialogues for the evaluation were gathered in the paper's four ways: {prompts:,} prompts (section 3.4.2)."],
    ),
    "self_bleu": Chapter(
        "How alike the samples of a prompt are",
        ["{entries} checkpoints answered {prompts:,} prompts many times at each temperature."],
    ),
    "compare": Chapter(
        "Comparing the versions",
        ["{evaluations:,} evaluations were set against each other, prompt by prompt, by the world's judge where there "
         "is one, and by the reward models."],
    ),
    "promote": Chapter(
        "Promotion",
        ["Each version challenged the champion before it, by the rules of params.yaml; the answer on top tells how it "
         "went."],
    ),
    "reward_scaling": Chapter(
        "Study: reward models by data and size", ["{trainings:,} reward models were trained, off the main path."]
    ),
    "distillation": Chapter(
        "Study: smaller models", ["Smaller models learnt the largest one's samples, off the main path."]
    ),
    "safety_scaling": Chapter(
        "Study: more safety data", ["{trainings:,} models were trained with more and more safety data, by name only."]
    ),
}  # fmt: skip


def said_of(parts: Sequence[str], figures: Mapping[str, float]) -> str:
    """Return those of the sentences whose figures there are."""
    formatter = string.Formatter()
    values = {name: int(value) if float(value).is_integer() else value for name, value in figures.items()}
    return " ".join(
        formatter.vformat(part, (), values)
        for part in parts
        if all(name is None or name in figures for _, name, _, _ in formatter.parse(part))
    )


# --- plots and tables of a stage's entries ---


def charts_of(plots: Mapping[str, Sequence[Drawn]], max_points: int) -> dict[str, Chart]:
    """Return a section's plots as charts, by their names; several entries' curves of one name are in one chart.

    Bars are points here, as their length says nothing that their end doesn't. Left out is what shows nothing: one
    point, bars that are all empty, more than `max_points` of them, and more curves than there are colours.
    """
    found: dict[str, tuple[Plot, list[Series]]] = {}
    for entry, own in plots.items():
        for name, plot, points in own:
            series = found.setdefault(name, (plot, []))[1]
            if plot.kind == "bars":
                kept = points.dropna(subset=["x"])
                series.append(Series(entry or plot.x_label, [str(y) for y in kept["y"]], kept["x"].tolist()))
                continue
            for title, part in points.dropna(subset=["y"]).groupby("series", sort=False):
                words = ", ".join(word for word in (entry, str(title)) if word)
                series.append(Series(words, part["x"].tolist(), part["y"].tolist()))
    charts = {}
    for name, (plot, series) in found.items():
        if len(series) > MAX_SERIES:  # of many sources all together, of many rounds the last one
            last = list(plots)[-1]
            together = [each for each in series if each.name.split(", ")[-1] == "all"]
            series = together or [each for each in series if each.name.split(", ")[0] == last]
        places = {x for each in series for x in each.x}
        if not 0 < len(series) <= MAX_SERIES or len(places) < 2:
            continue
        if plot.kind == "bars" and (len(places) > max_points or not any(any(each.y) for each in series)):
            continue
        labels = (plot.y_label, plot.x_label) if plot.kind == "bars" else (plot.x_label, plot.y_label)
        charts[name] = Chart(plot.title, *labels, series, joined=plot.kind != "bars")
    return charts


def tables_of(plots: Mapping[str, Sequence[Drawn]], max_rows: int) -> list[dict[str, Any]]:
    """Return a section's plots as tables for `page.html`: a column an entry, or a series where there is one entry.

    Long ones show rows at even distances, and `rest` says so.
    """
    import pandas

    merged: dict[str, tuple[Plot, list[pd.DataFrame]]] = {}
    for entry, own in plots.items():
        for name, plot, points in own:
            merged.setdefault(name, (plot, []))[1].append(points.assign(entry=entry))
    found = []
    for name, (plot, parts) in merged.items():
        points = pandas.concat(parts)
        value, row = ("x", "y") if plot.kind == "bars" else ("y", "x")
        column = "entry" if len(parts) > 1 or plot.kind == "bars" else "series"
        keys = [row] if column == "series" or plot.series is None or plot.kind == "bars" else ["series", row]
        wide = points.drop_duplicates([*keys, column]).set_index([*keys, column])[value].unstack(column, sort=False)
        shown = wide if len(wide) <= max_rows else wide.iloc[:: -(-len(wide) // max_rows)]
        heads = {"series": "curve", row: plot.y_label if plot.kind == "bars" else plot.x_label}
        found.append(
            {
                "title": plot.title,
                "name": name,
                "columns": [*(heads[key] for key in keys), *(str(each) or plot.x_label for each in wide.columns)],
                "rows": [
                    [*map(cell, index if isinstance(index, tuple) else (index,)), *map(cell, values)]
                    for index, values in zip(shown.index, shown.to_numpy().tolist(), strict=True)
                ],
                "rest": f"{len(shown)} of {len(wide)} rows, at even distances" if len(shown) < len(wide) else "",
            }
        )
    return found


def cell(value: Any) -> str:
    """Return a value as a table shows it: nothing for one that is missing, numbers with four digits."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def side_by_side(figures: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Return each figure's values in several stages, as text; none where a stage doesn't have it."""
    names = dict.fromkeys(name for own in figures for name in own)
    return {name: [cell(own.get(name)) for own in figures] for name in names}
