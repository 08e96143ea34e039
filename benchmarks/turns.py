"""Shared code of the benchmarks: runs that take their steps in turns, each in its own process, and parts by name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Run = TypeVar("Run")
Outcome = TypeVar("Outcome")


class Turns:
    """Lets processes take their steps one after another, so that all meet the same noise on the machine."""

    def __init__(self, count: int) -> None:
        fresh = get_context("spawn")
        self.count, self.changed, self.whose = count, fresh.Condition(), fresh.Value("i", 0)

    def take(self, number: int) -> None:
        """Wait for our turn."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.whose.value == number, timeout=600), "another run has stopped"

    def give(self, number: int) -> None:
        """Let the next process continue."""
        with self.changed:
            self.whose.value = (number + 1) % self.count
            self.changed.notify_all()


class Clock:
    """Times the steps of one run: everything from the start of one step to the next, except the others' turns."""

    def __init__(self, turns: Turns, number: int) -> None:
        self.turns, self.number = turns, number
        self.seconds: list[float] = []
        self.started = 0.0

    def begin(self) -> None:
        """Begin a step; the previous one, which includes reading this one's batch, ends here."""
        if self.started:
            self.end()
        self.turns.take(self.number)
        self.started = time.perf_counter()

    def end(self) -> None:
        """End the last step."""
        self.seconds.append(time.perf_counter() - self.started)
        self.turns.give(self.number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock for as long as the block lasts."""
        stopped = time.perf_counter()
        yield
        self.started += time.perf_counter() - stopped


def train_in_turns(train: Callable[[Run, Clock], Outcome], runs: Sequence[Run]) -> list[Outcome]:
    """Train all runs side by side, step by step, each in its own process; return what `train` returns for each."""
    fresh, turns = get_context("spawn"), Turns(len(runs))
    results = fresh.SimpleQueue()
    workers = [
        fresh.Process(target=_train, args=(train, run, Clock(turns, number), results))
        for number, run in enumerate(runs)
    ]
    for worker in workers:
        worker.start()
    outcomes = dict(results.get() for _ in runs)
    for worker in workers:
        worker.join()
    return [outcomes[number] for number in range(len(runs))]


def _train(train: Callable[[Run, Clock], Outcome], run: Run, clock: Clock, results: Any) -> None:
    results.put((clock.number, train(run, clock)))


def run_parts(parts: Mapping[str, Callable[[], None]], *packages: str) -> None:
    """Run the parts named on the command line, or all of them, after printing the versions that are measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    print(f"{torch.get_num_threads()} threads, {versions}")
    for name in sys.argv[1:] or parts:
        print(f"\n### {name}\n")
        parts[name]()
