"""Extra memory of the linear head: counted, not timed. Each case runs in a process of its own and reads its peak."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

PROBE = """
import sys, torch, fastloss
n, d, v, limit = map(int, sys.argv[1:5])
torch.set_num_threads(2)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
x = torch.randn(n, d, requires_grad=True)
w = (torch.randn(v, d) * d**-.5).requires_grad_()
y = torch.randint(0, v, (n,))
small = w.detach()[:512].clone().requires_grad_()
fastloss.linear_cross_entropy(x[:64], small, y[:64] % 512).backward()
x.grad = None
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
fastloss.linear_cross_entropy(x, w, y, max_extra_bytes=limit or None).backward()
print(status("VmHWM") - before - (x.nbytes + w.nbytes))
"""


def extra_bytes(n: int, d: int = 128, v: int = 40000, limit: int = 0) -> int:
    """Peak of one forward and backward, both gradients taken off."""
    out = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, (n, d, v, limit))], capture_output=True, text=True, check=True
    )
    return int(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_does_not_grow_with_rows_and_obeys_the_limit() -> None:
    n, v, mib = 2048, 40000, 2**20
    logits = n * v * 4
    accumulator = v * 128 * 4
    small, large = extra_bytes(n), extra_bytes(2 * n)
    assert small - accumulator <= logits / 8 + 24 * mib, f"{small / mib:.0f} MiB extra, logits {logits / mib:.0f}"
    assert large - small <= logits / 32, f"grows with N: {small / mib:.0f} -> {large / mib:.0f} MiB"
    limited = extra_bytes(n, limit=8 * mib)
    assert limited - accumulator <= 8 * mib + 24 * mib, f"{limited / mib:.0f} MiB with max_extra_bytes of 8 MiB"


def test_saved_for_backward_is_small() -> None:
    """Nothing N x V is saved: in mode R the inputs and a few numbers a row, in mode C the gradients."""
    import fastloss

    n, d, v = 64, 16, 5000
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    y = torch.randint(0, v, (n,))
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.nbytes)
        return t

    for reduction in ("mean", "none"):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fastloss.linear_cross_entropy(x, w, y, reduction=reduction)
        assert max(saved) <= w.nbytes
        assert sum(saved) <= 2 * (w.nbytes + x.nbytes) + 64 * n * 4
