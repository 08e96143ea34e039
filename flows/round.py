"""The next round of RLHF: `python -m flows.round [--profile NAME] [--set NAME=VALUE] [--only-write vN]`.

A round's entries in params.yaml follow from those of the round before: this flow appends them, with the version's
controls, evaluations and comparisons, once that round is done, and then brings the pipeline up to date as the flow
`recipe` does. It runs by hand and as a deployment. A round that was stopped on its way is continued by the recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import State, flow

from flows import graph, recipe, values
from tasks.reading.rounds import JOINED, round_number
from tasks.running.params import read_params
from tasks.running.places import NOTHING
from tasks.running.processes import pipeline_lock

SAMPLES = "data/rejection_sampling"
FINE_TUNING, PPO = "fine_tuning", "ppo"  # the stages that make versions: of a round that has both, ppo
DIVIDE_PROMPTS = ("responses", "rejection_sampling", PPO)  # sections whose `num_rounds` share their prompts


@flow(name="round", task_runner=recipe.TASK_RUNNER, validate_parameters=False)
def next_round(
    profiles: list[str] | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, str] | State[Any]:
    """Append the next round to params.yaml and bring the pipeline up to date; return what the flow `recipe` does.

    Args:
        profiles: names of files in profiles/ whose values are written into params.yaml first.
        overrides: dotted names of params.yaml and their values, written next, before the round.

    Raises ValueError as `append_round` does, and as the flow `recipe` does.
    """
    return recipe.bring_up_to_date([], lambda: append_round(values.compose(profiles or [], overrides or {})))


def append_round(text: str) -> str:
    """Return params.yaml's text with the entries of the round after those that it has.

    Raises ValueError when the newest round of params.yaml, as that stands, is not done, and as `with_entries` does.
    """
    params = read_params()
    rounds = mapping_at(params, "rounds")
    if rounds:
        newest_name = max(rounds, key=round_number)
        check_done(newest_name, last_stage(params, newest_name))
    newest = max(map(round_number, mapping_at(values.parse(text), "rounds")), default=-1)
    return with_entries(text, range(newest + 1, newest + 2))


def last_stage(params: Any, name: str) -> str:
    """Return the stage that makes a round's version; when it is up to date, so is all that it was made from."""
    return PPO if name in mapping_at(params, f"{PPO}.rounds") else FINE_TUNING


def check_done(name: str, stage: str) -> None:
    """Raise ValueError when a round's version, or anything it was made from, is not up to date, or there is none."""
    stale = graph.find_stale(graph.read_graph([f"{stage}@{name}"]))
    if stale:
        raise ValueError(
            f"round {name} is not done, and the next one starts from it; out of date: {', '.join(stale)}; "
            "`python -m flows.recipe` brings them up to date"
        )
    if not Path("data", stage, name, "config.json").is_file():
        raise ValueError(
            f"round {name} has no version, from which the next one would start: its rejection sampling asked no "
            "prompts; raise `rejection_sampling.max_prompts`"
        )


# --- entries ---


def with_entries(text: str, numbers: range) -> str:
    """Return params.yaml's text with all entries of the rounds of these numbers; those that it has stay as they are.

    Round v1 is number 0. Raises ValueError for a round that has no share of the prompts, and for a section that is no
    mapping.
    """

    def change(params: Any) -> None:
        for number in numbers:
            add_round(params, number)

    return values.edit(text, change)


def add_round(params: Any, number: int) -> None:
    """Add a round to `params`, and what is measured beside it: controls, evaluations, comparisons, drift.

    It ends with PPO if the round before does.
    """
    name, before = f"v{number + 1}", f"v{number}"
    rounds = mapping_at(params, "rounds")
    if name not in rounds:
        check_prompts(params, name, number)
        values.append(rounds, name, entry_of(params, number))
        mapping_at(params, "compare")["rewards"] = name
        if number and last_stage(params, before) == PPO:
            add(mapping_at(params, f"{PPO}.rounds"), {name: {"init_from": f"data/{FINE_TUNING}/{name}"}})
        for stage in JOINED:
            if rounds[name][stage] == f"data/{stage}/{name}":
                earlier = rounds[before][stage]
                add(
                    mapping_at(params, f"{stage}.rounds"),
                    {name: {"newest": rounds[name]["newest"], "earlier": earlier}},
                )
    stage = last_stage(params, name)
    checkpoints = {name: f"data/{stage}/{name}"}
    if stage == PPO:
        checkpoints[f"{name}_before_ppo"] = f"data/{FINE_TUNING}/{name}"
        controls = {f"{name}_further": further_of(params, name)}
    else:
        controls = controls_of(params, name, before if number else None)
    checkpoints |= {control: f"data/controls/{control}" for control in controls}
    add(mapping_at(params, "controls"), controls)
    add(mapping_at(params, "evaluate.checkpoints"), checkpoints)
    versions = [before] if number else []  # the baseline is every version's opponent
    opponents = [*versions, *(each for each in checkpoints if each != name)]
    add(mapping_at(params, "compare.opponents"), {name: opponents})
    add(mapping_at(params, "self_bleu.checkpoints"), {name: checkpoints[name]})
    if joined_of(params, name)["ghost_attention"] != str(NOTHING):
        add(mapping_at(params, "conversations.checkpoints"), {name: checkpoints[name]})
    if number:
        drift = {f"{before}_on_{name}": {"model": before, "batch": name}}
        add(mapping_at(params, "reward_drift.comparisons"), drift)


def check_prompts(params: Any, name: str, number: int) -> None:
    """Raise ValueError when a new round has no share of the prompts."""
    for section in DIVIDE_PROMPTS:
        num_rounds = mapping_at(params, section)["num_rounds"]
        if number >= num_rounds:
            raise ValueError(
                f"params.yaml: `{section}.num_rounds` is {num_rounds}, and its prompts are divided among so many "
                f"rounds: none are left for {name}; raise it, which gives every round other prompts"
            )


def entry_of(params: Any, number: int) -> dict[str, str]:
    """Return the entry of a round, given those before it. Raises ValueError when the one before is missing."""
    rounds = mapping_at(params, "rounds")
    if not number:
        first = {"newest": "data/sft", "earlier": "data/sft/early", "batches": "data/world/preferences"}
        return {**first, "samples": str(NOTHING), "distil_from": str(NOTHING), **dict.fromkeys(JOINED, str(NOTHING))}
    before = f"v{number}"
    if before not in rounds:
        raise ValueError(f"params.yaml: `rounds` has no {before}, from which v{number + 1} would start: add it first")
    return {
        "newest": f"data/{last_stage(params, before)}/{before}",
        "earlier": rounds[before]["newest"],
        "batches": f"data/preferences/{before}",
        "samples": f"{SAMPLES}/{before}",
        "distil_from": str(NOTHING),
        # what the round before has, this one has, too: its own, with the earlier rounds' among it
        **{stage: following(rounds[before][stage], before, f"v{number + 1}") for stage in JOINED},
    }


def following(path: str, before: str, name: str) -> str:
    """Return a round's data set where `path` is the one of the round before; one that isn't a round's own stays."""
    return str(Path(path).with_name(name)) if Path(path).name == before else path


def further_of(params: Any, name: str) -> dict[str, str]:
    """Return the control of a round's version that PPO made: as many steps on samples instead."""
    own = {"init_from": f"data/{FINE_TUNING}/{name}", "steps_of": f"data/{PPO}/{name}"}
    return {**own, "samples": f"{SAMPLES}/{name}", "answers": "best", "length": "steps", **joined_of(params, name)}


def controls_of(params: Any, name: str, before: str | None) -> dict[str, dict[str, str]]:
    """Return the controls of a round's fine-tuned version; `before`: the round before."""
    own = {"init_from": str(mapping_at(params, FINE_TUNING)["init_from"]), "steps_of": f"data/{FINE_TUNING}/{name}"}
    joined = joined_of(params, name)
    found = {
        f"{name}_demonstrations": {
            **own,
            "samples": str(NOTHING),
            "answers": "none",
            "length": "steps",
            **dict.fromkeys(JOINED, str(NOTHING)),
        },
        f"{name}_random": {**own, "samples": f"{SAMPLES}/{name}", "answers": "random", "length": "steps", **joined},
    }
    if before:
        found[f"{name}_again"] = {
            **own,
            "samples": f"{SAMPLES}/{before}",
            "answers": "best",
            "length": "steps",
            **joined,
        }
    return found


def joined_of(params: Any, name: str) -> dict[str, str]:
    """Return the data sets that join a round's samples, by their stage."""
    return {stage: str(mapping_at(params, f"rounds.{name}")[stage]) for stage in JOINED}


def add(mapping: Any, entries: Mapping[str, Any]) -> None:
    """Add entries to a mapping of params.yaml, except those whose name it has."""
    for key, value in entries.items():
        if key not in mapping:
            values.append(mapping, key, value)


def mapping_at(params: Any, name: str) -> Any:
    """Return the mapping of a dotted name. Raises ValueError when there is none."""
    place = params
    for key in name.split("."):
        place = place.get(key) if isinstance(place, Mapping) else None
    if not isinstance(place, Mapping):
        raise ValueError(f"params.yaml: `{name}` is {place!r}: it must hold entries, or be {{}}")
    return place


# --- the command ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Append the next round and run, or only write entries; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.round",
        description="Append the next round and run the pipeline.",
    )
    recipe.add_values(parser)
    parser.add_argument(
        "--only-write",
        metavar="vN",
        help="write all entries that params.yaml lacks of rounds v1 to vN, done or not; run nothing",
    )
    asked = parser.parse_args(arguments)
    return recipe.guarded(lambda: _run(asked.profile, asked.set, asked.only_write))


def _run(profiles: list[str], assignments: list[str], only_write: str | None) -> int:
    overrides = dict(values.parse_assignment(text) for text in assignments)
    text = values.compose(profiles, overrides)
    if only_write is not None:
        numbers = range(round_number(only_write) + 1)
        with pipeline_lock("entries are being written"):
            is_new = values.write(with_entries(text, numbers))
        sys.stdout.write(
            "params.yaml has new entries; `git diff params.yaml` shows them, `python -m flows.recipe` runs them\n"
            if is_new
            else f"params.yaml has all entries of rounds v1 to {only_write}\n"
        )
        return 0
    with pipeline_lock("a look at the round before"):
        append_round(text)  # what is wrong is told at once, without a server
    return recipe.run_flow(lambda: next_round(profiles, overrides, return_state=True), [])


if __name__ == "__main__":
    sys.exit(main())
