"""How long versions keep to an instruction that was given once (Llama 2, section 3.3, tables 30 and 31, figure 10).

The world's judge says of every turn of the evaluation's conversations whether the answer respects the instructions that
it can show; an answer that was not finished, or that the context had no room for, does not. Shares come with Wilson's
interval, differences to another checkpoint, paired by conversation, with Student's. Conversations are of four groups:
one instruction such as training has, two of these, a value that it never has, and a pair that it never combines. Of two
instructions both must be respected.

Reads what the checkpoints answered (`conversations`), and the truth.
Writes judged.jsonl, turns.csv (share by checkpoint, turn and group), kinds.csv, plots/ and tables/; for MLflow
attention_<checkpoint>.png (one conversation, the attention of a checkpoint and of the one that it is compared with).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from tasks.judging.intervals import wilson
from tasks.judging.wins import mean_of
from tasks.running.files import read_lines, write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import DATA
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage, start
from tasks.world.judge import ConversationTruth, holds, read_conversations

ALL = "all"
GROUPS = (ALL, "one", "two", "value", "pair")


class Params(Section):
    """Which checkpoints are compared, and by what they are judged."""

    compared: dict[str, str] = Field(description="checkpoint that each of these is compared with, by name")
    truth: str = Field(min_length=1, description="directory of what the judge knows")


class Checkpoints(BaseModel):
    """The checkpoints in section `conversations` of params.yaml; only that stage reads the rest of the section."""

    checkpoints: dict[str, str] = Field(description="checkpoint of each, by its name")


class Held(NamedTuple):
    """Whether one answer respects its instructions; `turn` from 1."""

    conversation: str
    group: str
    kinds: str
    turn: int
    held: bool


def run(stage: Stage[Params]) -> dict[str, float]:
    """Judge what all checkpoints answered, compare, report."""
    params = stage.params
    names = list(parse_section(Checkpoints, read_params(), "conversations").checkpoints)
    for name in (*params.compared, *params.compared.values()):
        if name not in names:
            raise ValueError(
                f"params.yaml: `consistency.compared` names `{name}`, which is not one of `conversations.checkpoints`: "
                f"{', '.join(names)}"
            )
    if not names:  # nobody plays conversations
        return {"checkpoints": 0}
    known = read_conversations(Path(params.truth))
    judged = {name: judge_all(read_answers(name, known), known) for name in names}
    write(stage, judged)
    figures: dict[str, float] = {"checkpoints": len(judged)}
    for name, own in judged.items():
        for turn in turns_of(own):
            for group in GROUPS:
                hits = hits_of(own, group, turn)
                if hits:
                    place = f"{metric_name(name)}/turn/{turn}/{group}"
                    share = share_of(hits)
                    figures |= {place: share["share"], f"{place}/low": share["low"], f"{place}/high": share["high"]}
    for name, other in params.compared.items():
        for group in GROUPS:
            gains = gains_of(judged[name], judged[other], group)
            if gains:
                place = f"{metric_name(name)}/gain_over/{metric_name(other)}/{group}"
                estimate = mean_of(gains)
                figures[place] = estimate.value
                if estimate.low is not None and estimate.high is not None:
                    figures |= {f"{place}/low": estimate.low, f"{place}/high": estimate.high}
    return figures


def read_answers(name: str, known: Mapping[str, ConversationTruth]) -> list[dict[str, Any]]:
    """Return what a checkpoint answered in each conversation.

    Raises ValueError for conversations that the truth doesn't know.
    """
    path = DATA / "conversations" / name / "answers.jsonl"
    lines = read_lines(path)
    for line in lines:
        if line["id"] not in known or len(known[line["id"]].shown) != len(line["turns"]):
            raise ValueError(
                f"{path}: the truth doesn't know {line['id']}: was it written by another run of stage `world`? "
                "Evaluate conversations that the world wrote"
            )
    return lines


# --- judging ---


def judge_all(lines: Sequence[Mapping[str, Any]], known: Mapping[str, ConversationTruth]) -> list[Held]:
    """Judge every turn in which an instruction can show; a turn that was not played counts as not respected."""
    found = []
    for line in lines:
        truth, answers = known[line["id"]], line["answers"]
        kinds = " + ".join(str(each["type"]) for each in truth.instructions)
        group = ("one", "two")[len(truth.instructions) > 1] if truth.seen == "trained" else truth.seen
        for turn, shown in enumerate(truth.shown):
            if shown:
                text, finished = answers[turn] if turn < len(answers) else ("", False)
                held = finished and bool(holds(truth, turn, text))
                found.append(Held(truth.id, group, kinds, turn + 1, held))
    return found


def turns_of(own: Sequence[Held]) -> list[int]:
    """Return the turns that are reported: every other one, as the paper does."""
    return sorted({each.turn for each in own if each.turn % 2 == 0})


def hits_of(own: Sequence[Held], group: str, turn: int) -> list[bool]:
    """Return which answers of a turn respect their instructions, of one group's conversations."""
    return [each.held for each in own if each.turn == turn and group in (ALL, each.group)]


def shares_of(own: Sequence[Held]) -> dict[str, float]:
    """Return the share of each conversation's turns that hold."""
    held: dict[str, list[bool]] = {}
    for each in own:
        held.setdefault(each.conversation, []).append(each.held)
    return {name: sum(hits) / len(hits) for name, hits in held.items()}


def gains_of(these: Sequence[Held], those: Sequence[Held], group: str) -> list[float]:
    """Return, for each conversation of a group, by how much the share of its turns that hold is higher in these."""
    mine, others = (shares_of([each for each in own if group in (ALL, each.group)]) for own in (these, those))
    return [share - others[name] for name, share in mine.items()]


def share_of(hits: Sequence[bool]) -> dict[str, float]:
    """Return a share with its number and interval, as columns."""
    low, high = wilson(sum(hits), len(hits))
    return {"answers": len(hits), "share": sum(hits) / len(hits), "low": low, "high": high}


# --- files ---


def write(stage: Stage[Params], judged: Mapping[str, Sequence[Held]]) -> None:
    """Write the judgements, shares by turn and by kind, the plot and the picture."""
    import pandas

    write_lines(
        stage.output / "judged.jsonl",
        ({"checkpoint": name, **each._asdict()} for name, own in judged.items() for each in own),
    )
    turns = pandas.DataFrame(
        {"checkpoint": name, "group": group, "turn": turn, **share_of(hits)}
        for name, own in judged.items()
        for group in GROUPS
        for turn in turns_of(own)
        for hits in [hits_of(own, group, turn)]
        if hits
    )
    turns.to_csv(stage.output / "turns.csv", index=False)
    title = "Answers that respect their instruction, by turn"
    whole = turns[turns["group"] == ALL].drop(columns="group")
    stage.plot("turns", whole, Plot("curves", title, "turn", "share", "turn", "share of answers", "checkpoint"))
    # turns of one conversation are alike: its share is one value
    kinds = pandas.DataFrame(
        {"checkpoint": name, "kinds": kind, **mean_of(list(shares_of(part).values()))._asdict()}
        for name, own in judged.items()
        for kind in sorted({each.kinds for each in own})
        for part in [[each for each in own if each.kinds == kind]]
    )
    kinds.to_csv(stage.output / "kinds.csv", index=False)
    table = kinds.pivot(index="kinds", columns="checkpoint", values="value")[list(judged)].round(3).reset_index()
    stage.show("kinds", table, "Answers that respect their instruction, all turns, by kind of instruction")
    last = turns[turns["turn"] == turns["turn"].max()].pivot(index="group", columns="checkpoint", values="share")
    shown = last.loc[[group for group in GROUPS if group in last.index], list(judged)].round(3).reset_index()
    stage.show(
        "last_turn", shown, "The same at the last turn: one or two instructions as in training, a new value, a new pair"
    )
    for name, other in stage.params.compared.items():
        title = f"One conversation under {{instruction}}, as {other} and {name} play it"
        show_dialogue(stage, f"dialogue_{name}", title, other, name)
        draw_attention(stage.artifacts / f"attention_{name}.png", [other, name])


def show_dialogue(stage: Stage[Params], table: str, title: str, *names: str) -> None:
    """Show the first conversation as checkpoints play it, side by side."""
    import pandas

    first = {name: read_lines(DATA / "conversations" / name / "answers.jsonl")[0] for name in names}
    (turns, *_), (instruction, *_) = ([line[what] for line in first.values()] for what in ("turns", "instruction"))
    rows = [
        {"turn": number + 1, "the user": user}
        | {name: line["answers"][number][0] if number < len(line["answers"]) else "" for name, line in first.items()}
        for number, user in enumerate(turns)
    ]
    stage.show(table, pandas.DataFrame(rows), title.format(instruction=repr(instruction)))


def draw_attention(path: Path, names: Sequence[str]) -> None:
    """Draw the attention of checkpoints side by side: from each part of the conversation (down) to each (across).

    One that answered nothing has none.
    """
    import numpy as np

    names = [name for name in names if (DATA / "conversations" / name / "attention.csv").is_file()]
    if not names:
        return

    with picture(path, 4.5 * len(names), 4.8, nrows=1, ncols=len(names), squeeze=False) as axes:
        for panel, name in zip(axes[0], names, strict=True):
            weights = np.loadtxt(DATA / "conversations" / name / "attention.csv", delimiter=",", ndmin=2)
            panel.imshow(weights, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            panel.set_title(name)
            panel.set_xlabel("attention to: the conversation's tokens, in bins")
            panel.set_ylabel("attention from")


if __name__ == "__main__":
    start(Params, run)
