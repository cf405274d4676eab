"""What all benchmarks share: the clock, the machine's name, the groups that are measured and their inputs."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = os.environ.get("FASTLOSS_BENCH_DEVICE", "cuda" if CUDA else "cpu")
#: FASTLOSS_BENCH_TINY=1 runs every body on shapes of a few kilobytes: a test of the benchmarks, not a measurement.
TINY = os.environ.get("FASTLOSS_BENCH_TINY") == "1"
RESULTS = Path(__file__).parent / "results"
#: Memory that glibc keeps instead of giving it back: no page faults after the first call. What a long-running program with
#: an allocator of its own (jemalloc, tcmalloc) has.
WARM_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=107374182400:glibc.malloc.top_pad=1073741824"


def clock() -> float:
    """A wall clock that waits for the GPU, so that a round of queued launches is timed as a whole."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    """The name results are filed under: `nvidia-h200`, `intel-xeon-processor`."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


@dataclass(frozen=True)
class Group:
    """One comparison: an operation on one shape, all implementations of which are timed against each other."""

    op: str  # a key of implementations.CASES
    mode: str
    dtype: str
    shape: tuple[int, ...]  # N, V of logits; N, D, V of a linear head
    inputs: str = "peaked"  # or "normal"
    device: str = DEVICE

    @property
    def name(self) -> str:
        return f"{self.op} {self.mode} {self.dtype} {'x'.join(map(str, self.shape))} {self.inputs}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Group:
        return Group(**{**fields, "shape": tuple(fields["shape"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _zipf(v: int, n: int, device: str) -> tuple[Tensor, Tensor]:
    """(log-frequency of each class, n class ids drawn with it); which class is frequent is random, as in a vocabulary."""
    bias = -torch.log(torch.randperm(v, device=device) + 1.0)
    return bias, torch.multinomial(bias.exp(), n, replacement=True)


def logits(group: Group) -> tuple[Tensor, Tensor]:
    """z [N, V] and class ids.

    "peaked": classes by Zipf's law, p of the target from 0.2 % to 99.8 %. Normal logits alone are a benchmark trap: every
    p is about 1 / V, and code that skips small terms skips all of them.
    """
    n, v = group.shape
    on: dict[str, Any] = {"device": group.device}
    torch.manual_seed(0)
    z = torch.randn(n, v, **on).mul_(2)
    if group.inputs == "normal":
        y = torch.randint(0, v, (n,), **on)
    else:
        bias, y = _zipf(v, n, group.device)
        z += bias
        z[torch.arange(n, **on), y] = z.logsumexp(1) + torch.empty(n, **on).uniform_(-6, 6)
    return z.to(group.torch_dtype), y


def head(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], w [V, D] and class ids, whose logits are "peaked" or "normal" as above."""
    n, d, v = group.shape
    on: dict[str, Any] = {"device": group.device}
    torch.manual_seed(0)
    w = torch.randn(v, d, **on) / d**0.5
    if group.inputs == "normal":
        x, y = torch.randn(n, d, **on), torch.randint(0, v, (n,), **on)
    else:
        bias, y = _zipf(v, n, group.device)
        x = w[y] * torch.empty(n, 1, **on).uniform_(2, 20) + 0.5 * torch.randn(n, d, **on)
        x[:, :8] = w[:, :8] = 8**-0.5  # eight features carry the bias of the classes
        w[:, :8] *= bias[:, None]
    return x.to(group.torch_dtype), w.to(group.torch_dtype), y


def views(group: Group) -> tuple[Tensor, Tensor]:
    """Unit embeddings q, k [B, D] of two views. "peaked": k is q and noise, and there are as many near duplicates of each row
    as make its softmax at scale 20 anything from flat to certain; "normal": unrelated."""
    b, d = group.shape
    on: dict[str, Any] = {"device": group.device}
    torch.manual_seed(0)
    q, k = torch.randn(b, d, **on), torch.randn(b, d, **on)
    if group.inputs != "normal":
        q += 2 * torch.randn(-(-b // 8), d, **on).repeat_interleave(8, 0)[:b]  # eight rows of a kind
        k = q * torch.empty(b, 1, **on).uniform_(0, 2) + k
    return tuple(F.normalize(x, dim=1).to(group.torch_dtype) for x in (q, k))  # type: ignore[return-value]
