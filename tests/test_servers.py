from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import migrated_prefect

from flows import servers
from flows.servers import PORTS, free_port


def test_a_busy_port_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(servers, "MLFLOW_PORT", port)
        monkeypatch.setattr(servers, "PREFECT_PORT", free_port())
        assert not servers.port_is_free(port)
        assert servers.main() == 1
    assert f"port {port} of 127.0.0.1 is busy: `make ui` may be running already" in capsys.readouterr().err


def test_what_speaks_no_http_is_not_taken_for_a_server() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        speaker = threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0\r\n"))
        speaker.start()
        assert not servers.answers(f"http://127.0.0.1:{other.getsockname()[1]}/")
        speaker.join()


def test_prefects_variable_chooses_the_port_of_its_server() -> None:
    program = "from flows import servers; print(servers.PREFECT_PORT)"
    environment = {**os.environ, "PREFECT_SERVER_API_PORT": "4321"}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True) == "4321\n"
    environment.pop("PREFECT_SERVER_API_PORT")
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True) == "4200\n"


@pytest.mark.slow
def test_two_flows_do_not_share_a_server_that_ends_with_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    shutil.copytree(migrated_prefect(), tmp_path / "prefect")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "PREFECT_PORT", free_port())
    with servers.prefect_server() as first, servers.prefect_server() as second:
        assert first != second


def test_a_server_that_does_not_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "raise SystemExit('no room at the inn')"]
    message = r"the toy server did not start, see .scratch/toy.log: no room at the inn"
    with (
        pytest.raises(RuntimeError, match=message),
        servers.server("toy", command, {}, f"http://127.0.0.1:{free_port()}/"),
    ):
        pass


def test_a_server_lives_as_long_as_its_block_and_not_longer_than_its_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    with servers.server("files", command, {}, f"http://127.0.0.1:{port}/"):
        assert servers.answers(f"http://127.0.0.1:{port}/")
    assert servers.port_is_free(port)
    program = (
        "import sys, time\nfrom flows import servers\n"
        f"with servers.server('files', {command!r}, {{}}, 'http://127.0.0.1:{port}/'):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "up\n"
    (child,) = psutil.Process(starter.pid).children()
    starter.kill()
    starter.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


@pytest.mark.slow
def test_both_pages_answer_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    shutil.copytree(migrated_prefect(), tmp_path / "prefect")
    with (
        servers.start_mlflow(free_port()) as mlflow,
        servers.start_prefect(free_port()) as prefect,
    ):
        assert servers.answers(f"{mlflow}/")
        assert servers.answers(f"{prefect}/health")
        ports = {int(url.split(":")[2].split("/")[0]) for url in (mlflow, prefect)}
        listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port in ports]
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_a_port_is_free_and_no_outgoing_connection_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not set(PORTS) & set(range(first, last + 1))
    one = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one))
        other = free_port()
        monkeypatch.setattr(servers, "PORTS", [one, other])
        assert {free_port() for _ in range(20)} == {other}
