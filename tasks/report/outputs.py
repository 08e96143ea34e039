"""What the stages of this run left behind, as the report reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.running.files import read_json, read_lines
from tasks.running.places import entry_of, place_of, section_of

STUDIES = ("reward_scaling", "distillation", "safety_scaling")  # of studies/dvc.yaml: they run by name only


class NotRun(Exception):  # noqa: N818 - nothing is wrong
    """Raised where this run has not measured something; the message, which the page shows, says what to do about it."""


@dataclass(frozen=True)
class Outputs:
    """The outputs below `root` of the stages that the report waits for, in the graph's order, and params.yaml."""

    root: Path
    stages: Sequence[str]
    params: Mapping[str, Any]

    def entries(self, section: str) -> list[str]:
        """Return the rounds, checkpoints and so on that a section's stages are about; one empty word if it has one.

        Raises NotRun if the run has no stage of it.
        """
        found = [entry_of(name) for name in self.stages if section_of(name) == section]
        if not found and section in STUDIES:
            setting = f"report.studies.{section}=data/{section}"
            raise NotRun(f"not run: `python -m flows.recipe --set {setting}` runs this study and shows it here")
        if not found:
            raise NotRun(f"not run: this pipeline has no stage `{section}`")
        return found

    def newest(self, section: str) -> str:
        """Return the last of a section's entries. Raises NotRun as `entries` does."""
        return self.entries(section)[-1]

    def place(self, section: str, entry: str = "") -> Path:
        """Return the folder of a stage's output. Raises NotRun if the run has no such stage."""
        if entry not in self.entries(section):
            raise NotRun(f"not run: this pipeline has no stage `{section}@{entry}`")
        return self.root / place_of(f"{section}@{entry}" if entry else section)

    def figures(self, section: str, entry: str = "") -> dict[str, float]:
        """Return the figures of a stage. Raises NotRun as `place` does."""
        figures: dict[str, float] = read_json(self.place(section, entry) / "metrics.json")
        return figures

    def lines(self, section: str, entry: str, name: str) -> list[Any]:
        """Return the lines of a file of JSON lines. Raises NotRun if it was not written."""
        return read_lines(self._file(section, entry, name))

    def table(self, section: str, entry: str, name: str) -> Any:  # a DataFrame
        """Return a table of CSV, words such as `None` as they are. Raises NotRun if it was not written."""
        import pandas

        return pandas.read_csv(self._file(section, entry, name), keep_default_na=False, na_values=[""])

    def _file(self, section: str, entry: str, name: str) -> Path:
        path = self.place(section, entry) / name
        if not path.is_file():
            raise NotRun(f"not measured: {path} was not written")
        return path
