from pathlib import Path

import pytest

from tasks.running.params import Machine
from tasks.workers import cluster


@pytest.mark.parametrize("address", ["nowhere://here", "tcp://127.0.0.1:9"])
def test_a_scheduler_that_does_not_answer_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    machine = Machine(threads=1, workers=1, scheduler=address, num_ranks=1, hostfile=None, num_seats=1)
    message = f"`machine.scheduler` is {address}, but no Dask scheduler answers there .*: start it, or set null"
    with pytest.raises(ValueError, match=message), cluster.dask_client(machine, tmp_path, 1):
        pass


def test_no_more_workers_start_than_there_are_tasks(tmp_path: Path) -> None:
    machine = Machine(threads=1, workers=4, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    with cluster.dask_client(machine, tmp_path, 1) as client:
        workers = client.scheduler_info()["workers"]
        assert len(workers) == 1
        assert client.submit(sum, [1, 2]).result() == 3
        assert all(worker.startswith("tls://127.0.0.1:") for worker in workers)
