"""Collect the preferences that reward models learn from, of all rounds so far (Llama 2, section 3.2.1).

A round's own batch is the pairs of stage `responses`, labelled by `preferences.annotators`:

- simulated: annotators who know the truth but err (tasks/world/annotators.py).
- files: people; the stage waits for their labels (tasks/judging/labels.py says where they go, and what counts).
- dataset: nobody; the round has only public pairs, and response pairs are set aside as unlabelled.

The preferences of the round before are added or, in the first round, public pairs (tasks/reading/pairs.py). Pairs that
should not be learned from are set aside with the reason: no pair is lost. Prompts that open alike are on the same side
of the split into training and validation, in every round.

Run once for each round (`preferences@v1`). Reads data/responses/<round>, the batches before, labels or truth, and the
evaluation's prompts, to set aside pairs that ask the same.
Writes train.jsonl, validation.jsonl (tasks/reading/pairs.py: Preference), aside.jsonl (Aside), plots/degrees.csv; for
MLflow also tables of examples and of what is set aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from tasks.judging.agreement import report_agreement
from tasks.judging.intervals import wilson
from tasks.judging.labels import Decision, Labels, decide, find_labels, read_labels
from tasks.reading.contamination import plain, read_evaluation
from tasks.reading.pairs import Aside, PairSource, Preference, read_pairs, sift
from tasks.reading.prompts import DEGREES, KINDS, Kind, ResponsePair, as_text
from tasks.reading.rounds import round_of
from tasks.running.digests import fraction_of
from tasks.running.files import read_lines, write_lines
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.world.annotators import Annotators, annotate
from tasks.world.judge import read_truth

REASONS = (
    "unlabelled", "faulty_label", "tie", "chosen_unsafe", "identical", "empty", "unknown_degree", "evaluation_prompt",
    "malformed", "not_drawn",
)  # fmt: skip
SOURCES = {"simulated": "world", "files": "files", "dataset": "dataset"}  # annotators -> `source` of their pairs
BINS = ("chosen_safe", "both_safe", "both_unsafe")


class Params(Section):
    """Who labels a round's pairs, which public ones there are, and what is held out."""

    annotators: Literal["simulated", "files", "dataset"] = Field(
        description="who labels the round's pairs of responses"
    )
    simulated: Annotators = Field(description="the simulated annotators")
    labels: str = Field(min_length=1, description="directory of the labels that people bring, which DVC watches")
    max_alike: int = Field(gt=0, description="a batch of more labels stops the stage if all say the same")
    sources: dict[str, PairSource] = Field(description="public pairs below the first round's `batches`, by name")
    max_malformed_share: float = Field(ge=0, le=1, description="share of a source's rows; more stops the stage")
    validation_share: float = Field(gt=0, lt=1, description="share of prompts that is held out")
    num_examples: int = Field(gt=0, description="pairs of each kind and degree in the table of examples")


class Batch(NamedTuple):
    """A round's pairs of one kind, and their labels."""

    kind: Kind
    name: str
    pairs: list[ResponsePair]
    labels: Labels


def run(stage: Stage[Params]) -> dict[str, float]:
    """Label the round's pairs, add all earlier ones, set unsound ones aside, split, report."""
    params = stage.params
    place = round_of(stage.name)
    batches = label_batches(read_responses(DATA / "responses" / place.name), place.name, params, stage.seed)
    own, undecided = [], []
    for batch in batches:
        check_varied(batch, params.max_alike)
        preferences, aside = preferences_of(batch, SOURCES[params.annotators])
        own += preferences
        undecided += aside
    earlier, public, refused = read_earlier(Path(place.round.batches), params)
    kept, unsound = sift([*own, *public], read_evaluation())
    aside = [*undecided, *refused, *unsound]
    train, validation = split([*earlier, *kept], params.validation_share, stage.seed)
    num_read = sum(len(batch.pairs) for batch in batches) + len(earlier) + len(public) + len(refused)
    assert num_read == len(train) + len(validation) + len(aside), "a pair is lost"
    if not train or not validation:
        raise ValueError(
            f"{len(train)} pairs are left to learn from and {len(validation)} to validate with, of {num_read} read, "
            f"{len(aside)} of them set aside: bring more pairs, or change `preferences.validation_share`"
        )
    write_lines(stage.output / "train.jsonl", train)
    write_lines(stage.output / "validation.jsonl", validation)
    write_lines(stage.output / "aside.jsonl", aside)
    new = [pair for pair in kept if pair["round"] is not None]
    write_degrees(stage, new)
    write_tables(stage, new, aside)
    reasons = Counter(each["reason"] for each in aside)
    assert set(reasons) <= set(REASONS), reasons
    return {
        "pairs_read": num_read,
        "train": len(train),
        "validation": len(validation),
        "aside": len(aside),
        **{f"aside/{reason}": reasons[reason] for reason in REASONS},
        "earlier": len(earlier),
        "public": sum(pair["round"] is None for pair in kept),
        **label_figures(batches),
        **figures_of(new, place.round.newest),
        **safety_bins(own),
    }


# --- the round's own batch ---


def read_responses(directory: Path) -> dict[Kind, list[ResponsePair]]:
    """Return the round's pairs of responses. Raises ValueError, naming the file, when one is missing."""
    for kind in KINDS:
        if not (directory / f"{kind}.jsonl").is_file():
            raise ValueError(f"{directory / f'{kind}.jsonl'} is missing: run stage `responses@{directory.name}`")
    return {kind: read_lines(directory / f"{kind}.jsonl") for kind in KINDS}


def label_batches(pairs: Mapping[Kind, list[ResponsePair]], round_name: str, params: Params, seed: int) -> list[Batch]:
    """Return the batches that have pairs, with their labels; raises Waiting and ValueError as `judging.labels` does."""
    names = {kind: own[0]["batch"] for kind, own in pairs.items() if own}
    labels = {kind: Labels({}, {}, 0) for kind in names}
    if params.annotators == "simulated":
        truth = read_truth(Path(params.simulated.truth))
        for kind in names:
            by_pair = {pair["id"]: annotate(truth, params.simulated, pair, seed) for pair in pairs[kind]}
            labels[kind] = Labels(by_pair, {}, 0)
    elif params.annotators == "files":
        for kind, path in find_labels(Path(params.labels), round_name, names).items():
            labels[kind] = read_labels(path, kind, names[kind], {pair["id"] for pair in pairs[kind]})
    return [Batch(kind, name, pairs[kind], labels[kind]) for kind, name in names.items()]


def check_varied(batch: Batch, max_alike: int) -> None:
    """Raise ValueError for a batch of more than `max_alike` labels that all choose one side, or all say one degree."""
    labels = [label for own in batch.labels.by_pair.values() for label in own]
    if len(labels) <= max_alike:
        return
    choices, degrees = {label.choice for label in labels}, {label.degree for label in labels}
    if len(choices) == 1:
        side = "right" if choices.pop() else "left"
        raise ValueError(
            f"batch {batch.name}: all {len(labels)} labels choose the {side} answer, although the order was drawn at "
            "random: check how the labels were made"
        )
    if len(degrees) == 1:
        raise ValueError(
            f"batch {batch.name}: all {len(labels)} labels have the degree `{degrees.pop()}`: have annotators use all "
            "four, or check how the labels were made"
        )


def preferences_of(batch: Batch, source: str) -> tuple[list[Preference], list[Aside]]:
    """Return a batch's preferences, and its pairs without a decision."""
    preferences: list[Preference] = []
    aside: list[Aside] = []
    for pair in batch.pairs:
        labels, faults = batch.labels.by_pair.get(pair["id"], []), batch.labels.faults.get(pair["id"], [])
        decision = decide(labels)
        if decision is not None:
            preferences.append(preference_of(pair, decision, source))
            continue
        reason, detail = "unlabelled", f"batch {batch.name} has no label for it"
        if labels:
            reason, detail = "tie", f"its {len(labels)} annotators are divided"
        elif faults:
            reason, detail = "faulty_label", "; ".join(faults)
        aside.append({"reason": reason, "detail": detail, "kind": batch.kind, "source": source, "pair": pair})
    return preferences, aside


def preference_of(pair: ResponsePair, decision: Decision, source: str) -> Preference:
    """Return a pair with what was decided about it."""
    chosen, rejected = pair["responses"][decision.choice], pair["responses"][1 - decision.choice]
    return {
        "id": pair["id"],
        "messages": pair["messages"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "degree": decision.degree,
        "kind": pair["kind"],
        "chosen_safe": None if decision.safe is None else decision.safe[decision.choice],
        "rejected_safe": None if decision.safe is None else decision.safe[1 - decision.choice],
        "category": pair["category"],
        "responders": {"chosen": chosen["responder"], "rejected": rejected["responder"]},
        "annotator": decision.annotator,
        "source": source,
        "round": pair["round"],
    }


# --- earlier and public pairs, and the split ---


def read_earlier(directory: Path, params: Params) -> tuple[list[Preference], list[Preference], list[Aside]]:
    """Return the preferences of the round before, or the first round's public pairs and their refused rows."""
    if not directory.is_dir():
        raise ValueError(f"params.yaml: `rounds.*.batches` is {directory}, which is not a directory: correct the path")
    if all((directory / name).is_file() for name in ("train.jsonl", "validation.jsonl", "aside.jsonl")):
        return [*read_lines(directory / "train.jsonl"), *read_lines(directory / "validation.jsonl")], [], []
    public, refused = read_pairs(directory, params.sources, "preferences", params.max_malformed_share)
    return [], public, refused


def split(
    preferences: Sequence[Preference], validation_share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Return the pairs to train on and those held out, in their order.

    A hash of the prompt's first question decides: dialogues that open alike are on the same side, in every round.
    """
    train: list[Preference] = []
    validation: list[Preference] = []
    for pair in preferences:
        opening = plain([next(message for message in pair["messages"] if message["role"] == "user")])
        is_held_out = fraction_of(f"{seed} hold out {opening}") < validation_share
        (validation if is_held_out else train).append(pair)
    return train, validation


# --- figures ---


def label_figures(batches: Sequence[Batch]) -> dict[str, float]:
    """Return how many labels there are, and how far annotators agree where several have labelled a pair."""
    figures: dict[str, float] = {}
    for batch in batches:
        labels = batch.labels
        figures |= {
            f"{batch.kind}/labels": sum(map(len, labels.by_pair.values())),
            f"{batch.kind}/labels_replaced": labels.num_replaced,
            f"{batch.kind}/labels_faulty": sum(map(len, labels.faults.values())),
        }
        agreement = report_agreement(list(labels.by_pair.values()))
        figures |= {f"{batch.kind}/{name}": value for name, value in agreement.items()}
    return figures


def figures_of(new: Sequence[Preference], newest: str) -> dict[str, float]:
    """Return the degrees' shares of the round's own pairs, and how often the newest model's answer was chosen."""
    figures: dict[str, float] = {}
    for kind in KINDS:
        own = [pair for pair in new if pair["kind"] == kind]
        figures[f"{kind}/pairs"] = len(own)
        if not own:
            continue
        degrees = Counter(pair["degree"] for pair in own)
        figures |= {f"{kind}/{degree}": degrees[degree] / len(own) for degree in DEGREES}
        wins = sum(pair["responders"] is not None and pair["responders"]["chosen"]["model"] == newest for pair in own)
        low, high = wilson(wins, len(own))
        figures |= {
            f"{kind}/newest_wins": wins / len(own),
            f"{kind}/newest_wins/low": low,
            f"{kind}/newest_wins/high": high,
        }
    return figures


def safety_bins(own: Sequence[Preference]) -> dict[str, float]:
    """Return the bins of section 3.2.1 for safety pairs: only the chosen answer is safe, both are, neither is.

    Each is a share of the three together; pairs in which only the other answer is safe are a share of all pairs.
    """
    safety = [pair for pair in own if pair["kind"] == "safety" and pair["chosen_safe"] is not None]
    found = Counter((pair["chosen_safe"], pair["rejected_safe"]) for pair in safety)
    counts = [found[True, False], found[True, True], found[False, False]]
    if not found:
        return {}
    total = sum(counts)
    figures = {f"safety/bins/{name}": count / total for name, count in zip(BINS, counts, strict=True) if total}
    return {**figures, "safety/only_other_safe": found[False, True] / found.total()}


def write_degrees(stage: Stage[Params], new: Sequence[Preference]) -> None:
    """Write the plot of the degrees' shares."""
    import pandas

    rows = []
    for kind in KINDS:
        degrees = Counter(pair["degree"] for pair in new if pair["kind"] == kind)
        for degree in DEGREES:
            share = degrees[degree] / max(1, degrees.total())
            rows.append({"bar": f"{kind}: {degree}", "pairs": degrees[degree], "share": share})
    title, kinds = "How much better chosen answers are", "share of the pairs of their kind"
    stage.plot("degrees", pandas.DataFrame(rows), Plot("bars", title, "share", "bar", kinds, "kind and degree"))


def write_tables(stage: Stage[Params], new: Sequence[Preference], aside: Sequence[Aside]) -> None:
    """Write examples of each kind and degree, and of what is set aside for each reason."""
    import pandas

    examples: list[dict[str, Any]] = []
    for kind in KINDS:
        for degree in DEGREES:
            own = [pair for pair in new if pair["kind"] == kind and pair["degree"] == degree]
            for pair in own[: stage.params.num_examples]:
                shown = {name: value for name, value in pair.items() if name not in ("messages", "responders", "round")}
                examples.append({**shown, "prompt": as_text(pair["messages"])})
    if examples:
        pandas.DataFrame(examples).to_csv(stage.tables / "examples.csv", index=False)
    shown_aside = []
    for reason in REASONS:
        own_aside = [each for each in aside if each["reason"] == reason]
        shown_aside += [{**each, "pair": str(each["pair"])} for each in own_aside[: stage.params.num_examples]]
    if shown_aside:
        pandas.DataFrame(shown_aside).to_csv(stage.tables / "aside.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
