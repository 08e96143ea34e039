"""The local servers: Prefect's for a run by hand, and `make ui`, which starts Prefect's and MLflow's pages.

All listen on 127.0.0.1 only and die with the process that started them.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from urllib.error import HTTPError

from tasks.running.places import SCRATCH
from tasks.running.processes import die_with_parent
from tasks.steering.tracking import ARTIFACTS, default_store, without_password

# Prefect's own variable and default, where its commands look for a server.
PREFECT_PORT = int(os.environ.get("PREFECT_SERVER_API_PORT", "4200"))
MLFLOW_PORT = 5000
SECONDS_TO_START = 120
PORTS = range(20000, 32000)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens.

    It is outside the range for outgoing connections, one of which could otherwise take it before a server does.
    """
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def answers(url: str) -> bool:
    """Return whether a server answers at a local address."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - always a constant scheme and host
            return True
    except (OSError, HTTPException):  # nothing listens there, or it doesn't speak HTTP
        return False


def is_reachable(url: str) -> bool:
    """Return whether anything speaks HTTP at an address that a user has set, even if it only says no."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - the user's own
            return True
    except HTTPError:
        return True
    except (OSError, HTTPException, ValueError):  # ValueError: it is no address
        return False


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def server(name: str, command: Sequence[str], environment: Mapping[str, str], health: str) -> Iterator[None]:
    """Run a server for as long as the block lasts; its output goes to .scratch/NAME.log.

    It runs in a session of its own, so that Ctrl-C ends it after the flow, not before. Raises RuntimeError, naming the
    log, when it does not start.
    """
    SCRATCH.mkdir(exist_ok=True)
    log = SCRATCH / f"{name}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env={**os.environ, **environment},
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                raise RuntimeError(f"the {name} server did not start, see {log}: {' '.join(tail)}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def prefect_server() -> Iterator[str]:
    """Yield the address of Prefect's API: the configured server, one that `make ui` started, or one for this block.

    The last gets a random port: on the default one another workspace's flow would use it, and lose it with this block.
    """
    local = f"http://127.0.0.1:{PREFECT_PORT}/api"
    configured = os.environ.get("PREFECT_API_URL")
    if configured is not None:
        if not is_reachable(configured):
            raise RuntimeError(
                f"PREFECT_API_URL is {without_password(configured)}, where no Prefect server answers: start one there "
                "(here: `make ui`), or unset it to have one for this run alone"
            )
        yield configured
    elif answers(f"{local}/health"):
        yield local
    else:
        with start_prefect(free_port()) as url:
            yield url


@contextmanager
def start_prefect(port: int) -> Iterator[str]:
    """Start Prefect's server on a port; yield the address of its API."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    environment = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_API_URL": url}
    with server("prefect", command, environment, f"{url}/health"):
        yield url


@contextmanager
def start_mlflow(port: int) -> Iterator[str]:
    """Start MLflow's pages over the default store on a port; yield their address."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", default_store(), "--default-artifact-root", ARTIFACTS.absolute().as_uri()]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with server("mlflow", command, environment, f"{url}/health"):
        yield url


def main() -> int:
    """Start both servers, print their addresses, and wait for Ctrl-C; return the exit status."""
    busy = [port for port in (PREFECT_PORT, MLFLOW_PORT) if not port_is_free(port)]
    if busy:
        ports = " and ".join(map(str, busy))
        sys.stderr.write(
            f"port {ports} of 127.0.0.1 is busy: `make ui` may be running already; else stop what listens there\n"
        )
        return 1
    with ExitStack() as stack:
        sys.stdout.write("starting ...\n")
        mlflow = stack.enter_context(start_mlflow(MLFLOW_PORT))
        prefect = stack.enter_context(start_prefect(PREFECT_PORT)).removesuffix("/api")
        sys.stdout.write(f"MLflow   {mlflow}\nPrefect  {prefect}\nCtrl-C stops both.\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
