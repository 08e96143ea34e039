"""Dask workers for the corpus: local processes, or an existing cluster. Nothing else starts or connects to Dask."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tasks.running.params import Machine

SECONDS_TO_CONNECT = 30


@contextmanager
def dask_client(machine: Machine, scratch: Path, num_tasks: int) -> Iterator[Any]:
    """Yield a Dask client of the cluster at `machine.scheduler`, or of local processes that end with the block.

    No more local processes start than there are tasks. Workers of a cluster must run in this directory, on a shared
    file system, with this project installed. Raises ValueError when no scheduler answers at the address.
    """
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.ERROR)
    cluster: Any = nullcontext(machine.scheduler)
    if machine.scheduler is None:
        cluster = LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=min(machine.workers, num_tasks),
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            local_directory=str(scratch / "dask"),
            security=True,  # other users of this machine can't send it code
        )
    # A worker gets a task only when it is free: tasks that wait must not fill its memory.
    settings = {"distributed.scheduler.worker-saturation": 1.0}
    with dask.config.set(settings), cluster as address:
        try:
            client: Any = Client(address, timeout=f"{SECONDS_TO_CONNECT}s")  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"params.yaml: `machine.scheduler` is {machine.scheduler}, but no Dask scheduler answers there "
                f"({error}): start it, or set null for local processes"
            ) from None
        with client:
            yield client
