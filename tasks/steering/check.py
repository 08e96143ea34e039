"""Check the parameters of stages before any of them runs: `python -m tasks.steering.check STAGE ...`.

DVC removes a stage's output before it starts the stage, and a stage's turn may come only after hours: a misspelt or
impossible value is better found at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from tasks.running.params import Machine, Tracking, parse_section, read_params, seed_of
from tasks.running.places import section_of


def problems(stages: Sequence[str]) -> list[str]:
    """Return the errors in the sections of params.yaml that stages read; `ppo@v5` reads section `ppo`."""
    values = read_params()
    models: dict[str, type[BaseModel]] = {"machine": Machine, "tracking": Tracking}
    for name in dict.fromkeys(map(section_of, stages)):
        module = importlib.import_module(f"tasks.{name}")
        if not hasattr(module, "Params"):  # a package: the stage is its __main__
            module = importlib.import_module(f"tasks.{name}.__main__")
        models[name] = module.Params
    found = []
    checks: list[Callable[[], Any]] = [
        partial(seed_of, values),
        *(partial(parse_section, model, values, name) for name, model in models.items()),
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    lines = problems(sys.argv[1:])
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.exit(1 if lines else 0)
