"""Counted, not timed: bytes that autograd keeps, and the peak of a call beyond what was there before it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import WARM_MEMORY, Group

WORKER = Path(__file__).with_name("worker.py")
#: Large blocks go straight to and from the system, so that a second call starts as the first one did.
FRESH_MEMORY = "glibc.malloc.mmap_threshold=65536"


def saved_bytes(call: Callable[[], object], operands: Sequence[Tensor]) -> int:
    """Bytes that autograd saves between forward and backward, the operands themselves not counted."""
    known = {t.untyped_storage().data_ptr() for t in operands}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def _status(key: str) -> int:
    """A size of this process, in bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of_process(call: Callable[[], object], before: Callable[[], object]) -> int:
    """Peak resident bytes of one `call` beyond what was resident before. `before` makes what stays for good."""
    before()
    gc.collect()
    start = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    call()
    return _status("VmHWM") - start


def peak_of_device(call: Callable[[], object], before: Callable[[], object]) -> int:
    before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def in_worker(action: str, group: Group, tunables: str, **arguments: Any) -> dict[str, Any]:
    """Run `action` of worker.py in a process of its own, with the glibc allocator set up as `tunables` says."""
    request = json.dumps({"action": action, "group": group.as_dict(), **arguments})
    kept = (
        {"FASTLOSS_KEEP_BYTES": "0"} if action == "peak" else {}
    )  # a gradient of an earlier call would hide this one's
    environment = {
        **os.environ,
        **kept,
        "GLIBC_TUNABLES": tunables,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, str(WORKER), request], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"worker {action} on {group.name!r} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(group: Group, impl: str) -> int:
    """Peak bytes of one call of `impl`, its gradients included, measured in a fresh process."""
    return int(in_worker("peak", group, FRESH_MEMORY, impl=impl)["peak_bytes"])


def warm_report(group: Group, budget: float) -> dict[str, Any]:
    """interleave.report of the group on memory that has been touched before."""
    return in_worker("time", group, WARM_MEMORY, budget=budget)
