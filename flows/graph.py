"""The pipeline as dvc.yaml defines it: its stages in order, what each waits for, and which are out of date.

Studies, stages off the main path, have a dvc.yaml of their own below the root, where a plain `dvc repro` does not
look: they run only by name, with all that they need.
Nothing else in flows/ uses DVC's Python API, and only flows/round.py knows stages by name: those of a round.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.running.params import flatten, read_params
from tasks.running.places import NOTHING
from tasks.running.record import in_repository

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Node:
    """One stage: its name, DVC's address of it, the stages whose outputs it reads, and dvc.yaml's `meta`."""

    name: str
    address: str  # the name; for a study `studies/dvc.yaml:name`
    after: tuple[str, ...]
    meta: dict[str, Any]


def read_graph(targets: Sequence[str] = ()) -> list[Node]:
    """Return the stages that `targets` need (without targets, all but the studies), each after those it waits for.

    A target is the name of a stage or of a group (`ppo` stands for `ppo@v1`, `ppo@v2` ...).
    Raises ValueError for a target that dvc.yaml does not have, naming the closest match, and for a dvc.yaml or
    params.yaml that DVC can't read, for instance because a path is null.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    _check_paths()
    _tell_dvc_of_archive()
    try:
        graph = Repo().index.graph
    except DvcException as error:
        raise ValueError(f"dvc.yaml can't be read: {error}") from None
    if not graph:
        raise ValueError("dvc.yaml has no stages, or is missing: run from the project's root, where it is")
    graph = graph.subgraph([stage for stage in graph if not stage.is_data_source])  # leave out what `dvc add` tracks
    waits_for = networkx.DiGraph()
    for stage in graph.nodes:
        name = stage.addressing.rpartition(":")[2]
        if name in waits_for:
            raise ValueError(f"`{name}` is the name of two stages, in dvc.yaml and in a study: rename one")
        waits_for.add_node(name, address=stage.addressing, meta=dict(stage.meta or {}))
    for stage, needed in graph.edges:
        waits_for.add_edge(stage.addressing.rpartition(":")[2], needed.addressing.rpartition(":")[2])
    chosen = [name for target in targets for name in _match(target, sorted(waits_for))]
    if not targets:
        chosen = [name for name, address in waits_for.nodes(data="address") if address == name]
    wanted = set(chosen).union(*(networkx.descendants(waits_for, name) for name in chosen))
    order = networkx.lexicographical_topological_sort(waits_for.reverse())
    return [
        Node(name=name, after=tuple(sorted(waits_for.successors(name))), **waits_for.nodes[name])
        for name in order
        if name in wanted
    ]


def _tell_dvc_of_archive() -> None:
    """Tell DVC, in .dvc/config.local, that a downloaded archive is no git repository: else it stops."""
    from dvc.config import Config

    if not in_repository() and Path(".dvc").exists():
        config = Config(".dvc")
        if not config["core"].get("no_scm"):
            with config.edit("local") as local:
                local["core"]["no_scm"] = True


def _check_paths() -> None:
    """Raise ValueError when a dvc.yaml uses a null value of params.yaml: DVC only reports an unexpected error."""
    for file in [*Path().glob("dvc.yaml"), *Path().glob("*/dvc.yaml")]:
        known = flatten(read_params())
        for name in re.findall(r"\$\{([\w.]+)\}", file.read_text(encoding="utf-8")):
            if name in known and known[name] is None:
                raise ValueError(f"params.yaml: `{name}` is null, and {file} uses it: {NOTHING} stands for nothing")


def _match(target: str, names: list[str]) -> list[str]:
    """Return the stages that a target stands for."""
    found = [name for name in names if name == target or name.startswith(f"{target}@")]
    if not found:
        near = get_close_matches(target, names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(names)}"
        raise ValueError(f"dvc.yaml has no stage `{target}`; {hint}")
    return found


def find_stale(nodes: Sequence[Node]) -> list[str]:
    """Return the stages to run, in order: those out of date, and those that read what these will write.

    A stage of the second kind may turn out to be up to date when its turn comes; DVC decides then.
    Raises ValueError when DVC can't tell, for instance while another DVC process writes here.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        changed = set(Repo().status()) if nodes else set()  # of all stages: each named target costs half a second
    except DvcException as error:
        raise ValueError(f"DVC can't tell what is out of date: {error}") from None
    stale: list[str] = []
    for node in nodes:
        if node.address in changed or any(name in stale for name in node.after):
            stale.append(node.name)
    return stale


def count_waiting(nodes: Sequence[Node]) -> dict[str, int]:
    """Return how many of the stages, given in their order, wait for each one, directly or through others.

    The more wait for a stage, the sooner it should run.
    """
    waiting: dict[str, set[str]] = {node.name: set() for node in nodes}
    for node in reversed(nodes):
        for name in node.after:
            if name in waiting:
                waiting[name] |= {node.name, *waiting[node.name]}
    return {name: len(others) for name, others in waiting.items()}
