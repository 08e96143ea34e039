"""The flows: the pipeline as Prefect sees it, derived from dvc.yaml.

Prefect reads its environment when it is imported, so what it must find there is set here, before any flow's module.
"""

import os
from contextlib import suppress
from pathlib import Path

from tasks.running.places import SCRATCH
from tasks.running.processes import bypass_proxy


def prefect_home() -> Path | None:
    """Return where Prefect's files go if its own place can't be written to, as in many containers; else None."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home at all
        (Path.home() / ".prefect").mkdir(exist_ok=True)
        return None
    return SCRATCH.absolute() / "prefect"


os.environ.setdefault("DO_NOT_TRACK", "1")
bypass_proxy()
if "PREFECT_HOME" not in os.environ and (_home := prefect_home()) is not None:
    os.environ["PREFECT_HOME"] = str(_home)
