"""How a kernel is timed on a device: device events, implementations in turns, inputs no longer in the L2 cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastloss
from common import CUDA
from implementations import backend
from interleave import quartiles

DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 11
CASE_SECONDS = 15.0  # a case stops measuring after that


@dataclass(frozen=True)
class Case:
    family: str  # "rows", "linear", "pairs", "quant" or "lossless"
    mode: str
    dtype: str
    shape: tuple[int, ...]


def milliseconds(call: Callable[[], object]) -> float:
    """One call, by device events (the wall clock where there is no GPU)."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def in_turn(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(quartiles of the milliseconds, errors) of each implementation, all of them taking turns."""
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):
        try:
            call()
            call()
            if CUDA:
                torch.cuda.synchronize()
        except Exception as error:
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise  # the context is lost: this process ends, and the next one goes on with the next case
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for number in range(ROUNDS):
        if number >= 3 and time.monotonic() - start > CASE_SECONDS:
            break
        for name in calls if number % 2 == 0 else reversed(list(calls)):
            times[name].append(milliseconds(calls[name]))
    return {name: quartiles(t) for name, t in times.items()}, failed


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 1


def rotating(call: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> Callable[[], object]:
    """`call` on the next of `sets` each time, so that no input is still in the L2 cache."""
    turn = iter(range(1 << 62))
    return lambda: call(*sets[next(turn) % len(sets)])


def copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    count = max(1, math.ceil(4 * l2_bytes() / max(1, tensors[0].nbytes)))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(min(count, 16) - 1))]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-300))


def sample(n: int) -> Tensor:
    """Rows at the start, in the middle and at the end."""
    return torch.tensor(sorted({*range(min(8, n)), n // 2, *range(max(0, n - 8), n)}), device=DEVICE)


def kernels() -> Iterator[str]:
    """Our backends here, the reference left out."""
    yield from (name for name in fastloss.registry.ORDER[DEVICE] if name != "reference")


def on(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with backend(name):
            return call()

    return run


def peak(call: Callable[[], object]) -> int:
    if not CUDA:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
