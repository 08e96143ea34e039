"""The pipeline as dvc.yaml states it: its stages in order, what each waits for, and which are out of date.

Nothing else in flows/ knows a stage by name, and nothing else there touches DVC's Python API.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Node:
    """One stage: its name, the stages whose outputs it reads, and dvc.yaml's `meta` (retries, seat)."""

    name: str
    after: tuple[str, ...]
    meta: dict[str, Any]


def read_graph(targets: Sequence[str] = ()) -> list[Node]:
    """Return the stages that `targets` need (all stages without targets), each after those it waits for.

    A target is a stage's name, or that of a group (`ppo` stands for `ppo@v1`, `ppo@v2` ...).
    Raises ValueError for a target that dvc.yaml does not have, naming the near match, and for a dvc.yaml or
    params.yaml that DVC can't read.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        graph = Repo().index.graph
    except DvcException as error:
        raise ValueError(f"dvc.yaml can't be read: {error}") from None
    if not graph:
        raise ValueError("dvc.yaml has no stages, or is missing: run from the project's root, where it lies")
    waits_for = networkx.DiGraph()
    meta = {}
    for stage in graph.nodes:
        waits_for.add_node(stage.addressing)
        meta[stage.addressing] = dict(stage.meta or {})
    waits_for.add_edges_from((stage.addressing, needed.addressing) for stage, needed in graph.edges)
    wanted = set(waits_for.nodes)
    if targets:
        chosen = [name for target in targets for name in _match(target, sorted(waits_for.nodes))]
        wanted = set(chosen).union(*(networkx.descendants(waits_for, name) for name in chosen))
    order = networkx.lexicographical_topological_sort(waits_for.reverse())
    return [Node(name, tuple(sorted(waits_for.successors(name))), meta[name]) for name in order if name in wanted]


def _match(target: str, names: list[str]) -> list[str]:
    """The stages that a target means."""
    found = [name for name in names if name == target or name.startswith(f"{target}@")]
    if not found:
        near = get_close_matches(target, names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"
        raise ValueError(f"dvc.yaml has no stage `{target}`; {hint}")
    return found


def find_stale(nodes: Sequence[Node]) -> list[str]:
    """Return the stages to run, in order: those out of date, and those that read what these will write.

    A stage of the second sort may turn out unchanged when its turn comes; DVC decides then.
    Raises ValueError when DVC can't look, for instance while another DVC process writes here.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        changed = set(Repo().status(targets=[node.name for node in nodes])) if nodes else set()
    except DvcException as error:
        raise ValueError(f"DVC can't tell what is out of date: {error}") from None
    stale: list[str] = []
    for node in nodes:
        if node.name in changed or any(name in stale for name in node.after):
            stale.append(node.name)
    return stale
