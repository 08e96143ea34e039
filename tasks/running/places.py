"""Where things lie, and what a stage's name says: `ppo@v5` is section `ppo`, entry `v5`, place ppo/v5.

- data/<place>/                       the output, versioned by DVC
- .scratch/<place>/<fingerprint>/     what the stage needs to resume
- .runs/<place>/<fingerprint>/        the record: run.json, metrics.jsonl, artifacts/, tables/; what MLflow is sent
"""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")
NOTHING = DATA / "seeds" / "none"  # stands in params.yaml where no model is to be read: DVC can watch no null
SCRATCH = Path(".scratch")
RUNS = Path(".runs")


def section_of(stage_name: str) -> str:
    """Return the section of params.yaml that a stage reads; it is its module's name, too."""
    return stage_name.partition("@")[0]


def entry_of(stage_name: str) -> str:
    """Return what one of several stages of a section is about: a round, a checkpoint; empty for an only one."""
    return stage_name.partition("@")[2]


def place_of(stage_name: str) -> Path:
    """Return where a stage's files lie, below DATA, SCRATCH and RUNS."""
    return Path(*stage_name.split("@"))


def name_of(place: Path) -> str:
    """Return the name of the stage whose files lie at a place."""
    return "@".join(place.parts)


def dashed(stage_name: str) -> str:
    """Return a stage's name without the sign that MLflow's models can't have in theirs."""
    return stage_name.replace("@", "-")
