"""The next round of RLHF: its entries in params.yaml, which follow from those of the rounds before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows import values
from tasks.reading.rounds import round_number
from tasks.running.places import NOTHING

SAMPLES = "data/rejection_sampling"
VERSIONS = "data/fine_tuning"


def with_entries(text: str, through: str) -> str:
    """Return params.yaml's text with what is missing of the rounds' entries, through round `through`."""

    def change(params: Any) -> None:
        for number in range(round_number(through) + 1):
            add_entries(params, number)

    return values.edit(text, change)


def add_entries(params: Any, number: int) -> None:
    """Add a round's entries, and those of what is measured beside it, to `params`; those that are there stay."""
    name, before = f"v{number + 1}", f"v{number}"
    is_new = name not in params["rounds"]
    if is_new:
        values.append(params["rounds"], name, entry_of(params["rounds"], number))
    start = params["rounds"][name]["newest"]
    controls = controls_of(name, before if number else None, start)
    checkpoints = {name: f"{VERSIONS}/{name}"} | {control: f"data/controls/{control}" for control in controls}
    add(params["controls"], controls)
    add(params["evaluate"]["checkpoints"], checkpoints)
    add(params["compare"]["opponents"], {name: list(controls)})
    if is_new:
        params["compare"]["rewards"] = name
    if number:
        add(params["reward_drift"]["comparisons"], {f"{before}_on_{name}": {"model": before, "batch": name}})


def entry_of(rounds: Mapping[str, Any], number: int) -> dict[str, str]:
    """Return the entry of a round in `rounds`, given those before it."""
    if not number:
        first = {"newest": "data/sft", "earlier": "data/sft/early", "batches": "data/world/preferences"}
        return {**first, "samples": str(NOTHING), "distil_from": str(NOTHING)}
    before = f"v{number}"
    return {
        "newest": f"{VERSIONS}/{before}",
        "earlier": rounds[before]["newest"],
        "batches": f"data/preferences/{before}",
        "samples": f"{SAMPLES}/{before}",
        "distil_from": str(NOTHING),
    }


def controls_of(name: str, before: str | None, start: str) -> dict[str, dict[str, str]]:
    """Return the controls of a round's version, which starts from `start`; `before`: the round before, if any."""
    own = {"version": name, "start": start}
    found = {
        f"{name}_demonstrations": {**own, "samples": str(NOTHING), "answers": "none"},
        f"{name}_random": {**own, "samples": f"{SAMPLES}/{name}", "answers": "random"},
    }
    if before:
        found[f"{name}_again"] = {**own, "samples": f"{SAMPLES}/{before}", "answers": "best"}
    return found


def add(mapping: Any, entries: Mapping[str, Any]) -> None:
    """Add entries to a mapping of params.yaml, except those whose name it has."""
    for key, value in entries.items():
        if key not in mapping:
            values.append(mapping, key, value)
