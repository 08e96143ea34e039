"""The ranks of one run: join them, and gather what each has computed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch.distributed import FileStore, HashStore, Store  # type: ignore[attr-defined]

Part = TypeVar("Part")

FILE = "file://"  # what MASTER_ADDR begins with when the ranks of one host find each other through a file


def join_ranks() -> torch.device:
    """Join this run's ranks, as the launcher's environment names them; return this one's device."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    on_gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(backend, store=_store(num_ranks), rank=rank, world_size=num_ranks)
    if not on_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(torch.distributed.get_node_local_rank())
    return torch.device("cuda", torch.cuda.current_device())


def _store(num_ranks: int) -> Store | None:
    """Return the store in which ranks find each other; None is torch's own, a server that other hosts can reach."""
    if num_ranks == 1:
        return HashStore()
    address = os.environ["MASTER_ADDR"]
    return FileStore(address.removeprefix(FILE), num_ranks) if address.startswith(FILE) else None


def from_all_ranks(own: Mapping[int, Part]) -> list[Part]:
    """Return all ranks' results, on every rank, in order; each gives those of its own share of the numbers from 0."""
    parts: list[Mapping[int, Part]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    together = {number: found for part in parts for number, found in part.items()}
    return [together[number] for number in range(len(together))]
