"""The lossless ops in the self-test of `fastloss info`: torch's cross entropy, off by how far an op is from its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import registry
from .compress import compress

OPS = ("lossless_decode", "lossless_rows", "lossless_linear", "crc32c", "dfloat11_decode")
COLUMNS = 128  # of the matrix: what the fused product's kernels take


def arguments(op: str, x: Any, w: Any, codec: str = "p7") -> tuple[Any, ...]:
    """Arguments of a lossless op, made of the numbers of x [N, D] and w [V, D]."""
    if op == "crc32c":
        return w.detach().contiguous().reshape(-1).view(torch.uint8), 1000
    if op == "dfloat11_decode":
        return _dfloat11(w.device)
    w = w[: 16 * COLUMNS // w.shape[1]].reshape(-1, COLUMNS)  # little: the reference of R8 takes its time
    with registry.use_backend("reference"):  # whose bytes every encoder's are
        packed = compress(w, codec)
    blob, plan = packed.blob, packed.plan
    made: dict[str, Callable[[], tuple[Any, ...]]] = {
        "lossless_decode": lambda: (blob, plan, 64, packed.numel() - 100, w.dtype),
        "lossless_rows": lambda: (blob, plan, torch.tensor([5, w.shape[0] - 1, 5], device=w.device), w.dtype),
        "lossless_linear": lambda: (x.detach().reshape(-1, COLUMNS), blob, plan, None),
    }
    return made[op]()


def _dfloat11(device: torch.device) -> tuple[Any, ...]:
    """Two exponents, each of one bit: 800 numbers in blocks of 4 threads of 64 bits."""
    codes = (torch.arange(100) * 37 % 251).to(torch.uint8)
    luts = torch.zeros(2, 256, dtype=torch.uint8)
    luts[0, :128], luts[0, 128:] = 120, 121
    luts[1, 120:122] = 1
    positions = torch.tensor([0, 256, 512, 768, 800], dtype=torch.int32).view(torch.uint8)
    others = (torch.arange(800) * 7 % 256).to(torch.uint8)
    tensors = (luts, codes, others, positions, torch.zeros(16, dtype=torch.uint8))
    return *(t.to(device) for t in tensors), 800, 8, 4


def _apart(op: str, got: Any, wanted: Any) -> Any:
    """How many bytes differ; for the product, whose order of summation is free, the relative difference."""
    if op == "lossless_linear":
        return (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return (got.contiguous().view(torch.uint8) != wanted.contiguous().view(torch.uint8)).sum()


def by_op(op: str) -> Callable[..., Any]:
    """The loss, off by how far `op` of the backend in use is from its reference, for every codec that it takes."""

    def loss(q: Any, k: Any, target: Any) -> Any:
        value = F.cross_entropy(q.float() @ k.float().T, target, reduction="sum")
        off = torch.zeros((), device=value.device)
        with torch.no_grad():
            for codec in ("p7", "r8") if op == "lossless_decode" else ("p7",):
                given = arguments(op, q, k, codec)
                if codec != "p7" and not registry.able(op, *given):
                    continue
                got = registry.run(op, *given)
                with registry.use_backend("reference"):
                    off = off + value * _apart(op, got, registry.run(op, *given))
        return value + off

    return loss


def cases() -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
    """Name -> (the ops it runs through, the loss of q, k and the class of each row)."""
    return {op: ((op,), by_op(op)) for op in OPS}
