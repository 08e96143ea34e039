"""The recipe as a Prefect flow: `python -m flows.recipe [targets] [--profile NAME] [--set NAME=VALUE] [--plan]`.

dvc.yaml states the graph; the flow makes one Prefect task of each stage that is out of date, runs those side by side
that do not wait for each other, and leaves every other question to DVC. The same flow runs by hand, with a Prefect
server started for it alone, and as a deployment (prefect.yaml), with a server and a worker.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

os.environ.setdefault("DO_NOT_TRACK", "1")  # read by Prefect when it is imported

from prefect import flow, get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from flows import graph, summary, values
from tasks.reproduce import reproduce, stop_all
from tasks.stage import PIPELINE_VARIABLE, pipeline_lock

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.futures import PrefectFuture

LOCAL_SERVER = "http://127.0.0.1:4200/api"


@flow(name="recipe", task_runner=ThreadPoolTaskRunner(max_workers=64), validate_parameters=False)
def recipe(
    targets: list[str] | None = None, profiles: list[str] | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, str]:
    """Bring the pipeline up to date; return each stage's outcome: ran, up to date, failed, or not reached.

    Args:
        targets: stages to bring up to date, with all that they need; none means the whole pipeline.
        profiles: names of files in profiles/ whose values are written into params.yaml first.
        overrides: dotted names of params.yaml and their values, written in last.

    Raises RuntimeError when a stage failed, ValueError for a wrong name and when another pipeline runs here.
    """
    from prefect.runtime import flow_run

    logger = get_run_logger()
    with pipeline_lock(f"flow run {flow_run.name}"):
        os.environ[PIPELINE_VARIABLE] = str(flow_run.id)
        try:
            if values.write(values.compose(profiles or [], overrides or {})):
                logger.info("params.yaml holds new values; `git diff params.yaml` shows them")
            nodes = graph.read_graph(targets or [])
            stale = graph.find_stale(nodes)
            logger.info(f"{len(nodes) - len(stale)} stages are up to date, to bring up to date: {', '.join(stale)}")
            return _run_stages(nodes, stale)
        except BaseException:
            stop_all()
            raise
        finally:
            del os.environ[PIPELINE_VARIABLE]


def _run_stages(nodes: Sequence[graph.Node], stale: Sequence[str]) -> dict[str, str]:
    """Submit the stale stages, each waiting for those it reads; collect the outcomes."""
    futures: dict[str, PrefectFuture[str]] = {}
    for node in nodes:
        if node.name not in stale:
            continue
        task = reproduce.with_options(retries=int(node.meta.get("retries", 0)))
        futures[node.name] = task.submit(
            node.name,
            node.meta.get("seat"),
            wait_for=[futures[name] for name in node.after if name in futures],
        )
    outcomes = {node.name: "up to date" for node in nodes}
    failures = []
    for name, future in futures.items():
        future.wait()
        state = future.state
        if state.is_completed():
            outcomes[name] = future.result()
        elif state.name == "NotReady":
            outcomes[name] = "not reached"
        else:
            outcomes[name] = "failed"
            failures.append(str(state.message or name).removeprefix("Task run encountered an exception "))
    if failures:
        raise RuntimeError("; ".join(failures))
    return outcomes


def use_running_server() -> None:
    """Record in the server that `make ui` started, if one answers; otherwise Prefect starts one for this run alone."""
    if "PREFECT_API_URL" in os.environ:
        return
    try:
        with urllib.request.urlopen(f"{LOCAL_SERVER}/health", timeout=1):
            os.environ["PREFECT_API_URL"] = LOCAL_SERVER
    except (urllib.error.URLError, TimeoutError):
        return


def wait_for_records(flow_run_id: UUID) -> None:
    """Wait until the server has stored every task run's end: what a server of this run alone has not, is lost with it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    deadline = time.monotonic() + 15
    client = get_client(sync_client=True)
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    num_seen = -1
    while time.monotonic() < deadline:
        runs = client.read_task_runs(flow_run_filter=mine)
        all_ended = all(run.state is not None and run.state.is_final() for run in runs)
        if all_ended and len(runs) == num_seen:
            return
        num_seen = len(runs)
        time.sleep(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.recipe", description="Bring the pipeline up to date.")
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages, with all that they need; none: everything")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME", help="write profiles/NAME.yaml's values"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="write one value")
    parser.add_argument("--plan", action="store_true", help="print size, memory, time and cost; run and write nothing")
    asked = parser.parse_args(arguments)
    try:
        overrides = dict(values.parse_assignment(text) for text in asked.set)
        text = values.compose(asked.profile, overrides)
        if asked.plan:
            from flows.plan import plan

            sys.stdout.write(plan(values.parse(text)))
            return 0
        return _run(asked.targets, asked.profile, overrides, text)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _run(targets: list[str], profiles: list[str], overrides: dict[str, Any], text: str) -> int:
    """Run the flow if there is anything to do, then print the summary."""
    started = time.monotonic()
    if text == values.PARAMS_FILE.read_text(encoding="utf-8"):
        nodes = graph.read_graph(targets)
        if not graph.find_stale(nodes):
            outcomes = {node.name: "up to date" for node in nodes}
            sys.stdout.write(summary.summarize(nodes, outcomes, time.monotonic() - started))
            return 0
    use_running_server()
    state = recipe(targets, profiles, overrides, return_state=True)
    nodes = graph.read_graph(targets)
    wait_for_records(state.state_details.flow_run_id)
    if state.is_completed():
        sys.stdout.write(summary.summarize(nodes, state.result(), time.monotonic() - started))
        return 0
    sys.stderr.write(f"{state.message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
