"""Ratios that survive a noisy machine: all implementations in turn, round after round, and medians over the rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common import clock

Call = Callable[[], object]
#: A round of a fast call repeats it until it takes about this long.
SHORTEST_ROUND = 2e-3
#: A call that takes more than this part of the budget sits out after three rounds.
SLOW = 1 / 6


@dataclass
class Measurement:
    """Seconds of each round of each implementation (None: sat out), in the order they were given."""

    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def times(self, name: str) -> list[float]:
        return [t for t in self.seconds[name] if t is not None]

    def ratios(self, ours: str) -> dict[str, dict[str, float]]:
        """ours / other of each round: median and quartiles. Both halves of a ratio saw the same state of the machine."""
        found = {}
        for name, theirs in self.seconds.items():
            pairs = [a / b for a, b in zip(self.seconds[ours], theirs, strict=True) if a is not None and b is not None]
            if name != ours:
                found[name] = quartiles(pairs)
        return found

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: quartiles(self.times(name)) for name in self.seconds}


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(values)}


def _repeats(seconds: float) -> int:
    return max(1, min(1000, math.ceil(SHORTEST_ROUND / max(seconds, 1e-7))))


def _timed(call: Call, repeats: int = 1) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def interleaved(
    calls: Mapping[str, Call], ours: str, budget: float = 20.0, rounds: tuple[int, int] = (5, 15)
) -> Measurement:
    """Time all `calls` in turn until `budget` seconds have passed, at least rounds[0] and at most rounds[1] times.

    Every other round goes backwards, so that no implementation always follows the same one. A peer that raises is left
    out and its error kept; ours must run.
    """
    result = Measurement()
    first: dict[str, float] = {}
    for name, call in calls.items():
        try:
            call()  # compile, autotune, first touch
            first[name] = _timed(call)
        except Exception as error:  # a peer that cannot take this shape is no reason to stop
            if name == ours:
                raise
            result.failed[name] = f"{type(error).__name__}: {error}"[:300]
    result.seconds = {name: [] for name in first}
    start = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - start > budget:
            break
        for name in list(first) if number % 2 == 0 else reversed(list(first)):
            out = number >= 3 and name != ours and first[name] > SLOW * budget
            result.seconds[name].append(None if out else _timed(calls[name], _repeats(first[name])))
    return result


def report(measured: Measurement, ours: str) -> dict[str, Any]:
    """What a benchmark record keeps of a measurement."""
    return {
        "impl": ours,
        "implementations": measured.summary(),
        "ratios": measured.ratios(ours),
        "failed": measured.failed,
    }
