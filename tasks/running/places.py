"""Where files are, and what a stage's name means: `ppo@v5` is section `ppo`, entry `v5`, place ppo/v5.

- data/<place>/                       the output, versioned by DVC
- .scratch/<place>/<fingerprint>/     what the stage needs to resume
- .runs/<place>/<fingerprint>/        the record: run.json, metrics.jsonl, artifacts/, tables/; what is sent to MLflow
"""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")
NOTHING = DATA / "seeds" / "none"  # means "no model to read" in params.yaml, where DVC can't watch a null
SCRATCH = Path(".scratch")
RUNS = Path(".runs")


def section_of(stage_name: str) -> str:
    """Return the section of params.yaml that a stage reads, which is also its module's name."""
    return stage_name.partition("@")[0]


def entry_of(stage_name: str) -> str:
    """Return the round or checkpoint that one of a section's stages is about; empty if there is only one stage."""
    return stage_name.partition("@")[2]


def place_of(stage_name: str) -> Path:
    """Return where a stage's files are, below DATA, SCRATCH and RUNS."""
    return Path(*stage_name.split("@"))


def name_of(place: Path) -> str:
    """Return the name of the stage whose files are at a place."""
    return "@".join(place.parts)


def dashed(stage_name: str) -> str:
    """Return a stage's name without `@`, which names of MLflow's models can't contain."""
    return stage_name.replace("@", "-")
