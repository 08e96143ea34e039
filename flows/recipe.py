"""The recipe as a Prefect flow: `python -m flows.recipe [targets] [--profile NAME] [--set NAME=VALUE] [--plan]`.

dvc.yaml defines the graph; the flow turns each stage that is out of date into one Prefect task, runs independent ones
in parallel, and leaves everything else to DVC. The same flow runs by hand, with a Prefect server started just for it,
and as a deployment (prefect.yaml), with a server and a worker.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from prefect import State, flow, get_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import graph, servers, summary, values
from tasks.running.params import PARAMS_FILE, Machine, parse_section, read_params
from tasks.running.processes import PIPELINE_VARIABLE, pipeline_lock
from tasks.steering.reproduce import WAITING, allow_stages, reproduce, stop_all

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture


# What Prefect puts before an exception's message.
TASK_FAILED = "Task run encountered an exception RuntimeError: "
FLOW_FAILED = ("Flow run encountered an exception: RuntimeError: ", "Flow run encountered an exception: ValueError: ")

# Threads only wait for child processes: enough for all stages that may be ready at once.
TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)


@flow(name="recipe", task_runner=TASK_RUNNER, validate_parameters=False)
def recipe(
    targets: list[str] | None = None, profiles: list[str] | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, str] | State[Any]:
    """Bring the pipeline up to date; return each stage's outcome: ran, restored, or up to date.

    If a stage waits for people, those that need it are not started and all others run: the flow is then Completed
    under the name `Waiting`, and its message says what it waits for. The next run continues from there.

    Args:
        targets: stages to bring up to date, with all that they need; none means all of dvc.yaml, but no study.
        profiles: names of files in profiles/ whose values are written into params.yaml first.
        overrides: dotted names of params.yaml and their values, written last.

    Raises as `bring_up_to_date` does.
    """
    return bring_up_to_date(targets or [], lambda: values.compose(profiles or [], overrides or {}))


def bring_up_to_date(targets: Sequence[str], compose: Callable[[], str]) -> dict[str, str] | State[Any]:
    """Write params.yaml's new text, which `compose` returns, then run what is out of date: the body of a flow.

    No other pipeline runs here meanwhile. Raises RuntimeError when a stage failed, ValueError for a wrong name, when
    another pipeline runs here, and as `compose` does; nothing is written then.
    """
    from prefect.runtime import flow_run

    logger = get_run_logger()
    with pipeline_lock(f"flow run {flow_run.name}"):
        os.environ[PIPELINE_VARIABLE] = str(flow_run.id)
        try:
            if values.write(compose()):
                logger.info("params.yaml has new values; `git diff params.yaml` shows them")
            allow_stages(parse_section(Machine, read_params(), "machine").num_seats)
            nodes = graph.read_graph(targets)
            stale = graph.find_stale(nodes)
            logger.info(f"{len(nodes) - len(stale)} stages are up to date; out of date: {', '.join(stale)}")
            check_parameters(stale)
            return _run_stages(nodes, stale)
        except BaseException:
            stop_all()
            raise
        finally:
            del os.environ[PIPELINE_VARIABLE]


def _run_stages(nodes: Sequence[graph.Node], stale: Sequence[str]) -> dict[str, str] | State[Any]:
    """Submit the stale stages, each waiting for those it reads; collect the outcomes."""
    futures: dict[str, PrefectFuture[Any]] = {}
    urgencies = graph.count_waiting([node for node in nodes if node.name in stale])
    for node in nodes:
        if node.name not in stale:
            continue
        task = reproduce.with_options(retries=int(node.meta.get("retries", 0)))
        wait_for = [futures[name] for name in node.after if name in futures]
        futures[node.name] = task.submit(
            node.name, node.address, node.meta.get("seat"), urgencies[node.name], wait_for=wait_for, return_state=False
        )
    outcomes = {node.name: "up to date" for node in nodes}
    failures, waiting = [], []
    for name, future in futures.items():
        future.wait()
        state = future.state
        if state.is_completed():
            outcomes[name] = future.result()
        elif state.name == WAITING:
            outcomes[name] = "waiting"
            waiting.append(str(state.message))
        elif state.name == "NotReady":  # a stage that it needs is waiting, or failed
            outcomes[name] = "not started"
        else:
            failures.append(str(state.message or name).removeprefix(TASK_FAILED))
    if failures:
        raise RuntimeError("; ".join(failures))
    if waiting:
        return Completed(name=WAITING, message="\n".join(waiting), data=outcomes)
    return outcomes


def check_parameters(stages: Sequence[str]) -> None:
    """Raise ValueError when one of the stages reads a wrong value, before DVC removes an output for it."""
    command = [sys.executable, "-m", "tasks.steering.check", *stages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(result.stderr.strip())


def wait_for_records() -> None:
    """Wait until the server has all that this process sends in the background: what is left when it stops is lost."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=15, at_exit=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.recipe", description="Bring the pipeline up to date.")
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages, with all they need; default: everything")
    add_values(parser)
    parser.add_argument("--plan", action="store_true", help="print size, memory, time and cost; run and write nothing")
    asked = parser.parse_args(arguments)
    return guarded(lambda: _run(asked.targets, asked.profile, asked.set, asked.plan))


def add_values(parser: argparse.ArgumentParser) -> None:
    """Add the options that write values into params.yaml."""
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME", help="write profiles/NAME.yaml's values"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="write one value")


def guarded(run: Callable[[], int]) -> int:
    """Return what `run` does; an error or Ctrl-C becomes a line and an exit status."""
    try:
        return run()
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; no stage is left running, the next run continues from here\n")
        return 130


def _run(targets: list[str], profiles: list[str], assignments: list[str], only_plan: bool) -> int:
    """Run the flow if there is anything to do, then print the summary."""
    started = time.monotonic()
    overrides = dict(values.parse_assignment(text) for text in assignments)
    text = values.compose(profiles, overrides)
    if only_plan:
        from flows.plan import plan

        sys.stdout.write(plan(values.parse(text)))
        return 0
    with pipeline_lock("a look at what is out of date"):
        if text == PARAMS_FILE.read_text(encoding="utf-8"):  # new values may create new entries of stages
            nodes = graph.read_graph(targets)
            if not graph.find_stale(nodes):
                outcomes = {node.name: "up to date" for node in nodes}
                sys.stdout.write(summary.summarize(nodes, outcomes, time.monotonic() - started, waiting=None))
                return 0
    return run_flow(lambda: recipe(targets, profiles, overrides, return_state=True), targets)


def run_flow(call: Callable[[], State[Any]], targets: Sequence[str]) -> int:
    """Call a flow that brings `targets` up to date, with a server just for it; print the summary or the error.

    Return the exit status.
    """
    started = time.monotonic()
    with servers.prefect_server() as url, temporary_settings({PREFECT_API_URL: url}):
        try:
            state = call()
        finally:
            wait_for_records()
    nodes = graph.read_graph(targets)
    if state.is_completed():
        outcomes = cast("dict[str, str]", state.result())
        waiting = str(state.message) if state.name == WAITING else None
        sys.stdout.write(summary.summarize(nodes, outcomes, time.monotonic() - started, waiting))
        return 0
    message = str(state.message)
    for prefix in FLOW_FAILED:
        message = message.removeprefix(prefix)
    sys.stderr.write(f"{message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
