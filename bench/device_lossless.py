"""Lossless weights at the shapes of docs/device.md: cases of device_kernels.py.

Decoding of P7 and R8 beside a copy of the decoded tensor, and x Wᵀ from compressed weights beside cuBLAS on the dense ones.
`bytes`: what a case must move at least, read and written, for GB/s.
"""

from __future__ import annotations

from typing import Any

import torch

import fastloss
from device_timing import DEVICE, Case, in_turn, kernels, on
from fastloss import lossless
from implementations import backend

ops = torch.ops.fastloss
BATCHES = (1, 4, 16, 64)


def lossless_cases(tiny: bool) -> list[Case]:
    """Rows, columns; of a product the rows of x before them."""
    side = 128 if tiny else 8192
    return [
        *(Case("lossless", mode, "bfloat16", (side, side)) for mode in ("p7", "p7 tiles", "r8", "crc32c")),
        *(Case("lossless", mode, "float32", (side, side // 2)) for mode in ("p7", "r8")),
        *(Case("lossless", "linear", "bfloat16", (batch, side, side)) for batch in BATCHES),
        *(Case("lossless", f"compress {codec}", "bfloat16", (side, side)) for codec in ("p7", "r8")),
    ]


def lossless_case(case: Case) -> dict[str, Any]:
    """One decode, checksum, product or encode; decoded bits are compared with the tensor's."""
    rows, columns = case.shape[-2:]
    dtype = getattr(torch, case.dtype)
    weight = torch.randn(rows, columns, device=DEVICE).mul_(0.02).to(dtype)
    codec = case.mode.split()[-1] if case.mode.startswith("compress") else case.mode.split()[0]
    tiles = case.mode in ("p7 tiles", "linear")
    codec = codec if codec in ("p7", "r8") else "p7"
    packed = lossless.compress(weight, codec, layout="tiles" if tiles else "rows")
    blob, plan, count = packed.blob, packed.plan, weight.numel()
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    batch = case.shape[0] if case.mode == "linear" else 1
    x = torch.randn(batch, columns, device=DEVICE).to(dtype)
    product = x @ weight.T if case.mode == "linear" else x

    def call() -> Any:
        if case.mode == "linear":
            return ops.lossless_linear(x, blob, plan, None)
        if case.mode == "crc32c":
            return ops.crc32c(weight.reshape(-1).view(torch.uint8), 32768)
        if case.mode.startswith("compress"):
            return lossless.compress(weight, codec).blob
        return ops.lossless_decode(blob, plan, 0, count, dtype)

    errors, calls = {}, {}
    for name in kernels():
        try:
            with backend(name):
                found = call()
        except fastloss.BackendError:
            continue  # this backend has no kernel for it
        if case.mode == "linear":
            errors[f"fastloss-{name}"] = float((found - product).abs().max() / product.abs().max())
        elif found.dtype == dtype:
            errors[f"fastloss-{name}"] = float((found.view(integer) != weight.reshape(-1).view(integer)).sum())
        calls[f"fastloss-{name}"] = on(name, call)
    target = torch.empty_like(weight)
    calls["torch copy"] = lambda: target.copy_(weight)
    if case.mode == "linear":
        calls = {**calls, "torch bf16": lambda: x @ weight.T}
        del calls["torch copy"]
    times, failed = in_turn(calls)
    moved = (
        blob.nbytes
        if case.mode == "linear"
        else weight.nbytes
        if case.mode == "crc32c"
        else blob.nbytes + weight.nbytes
    )
    return {"ms": times, "failed": failed, "errors": errors, "bytes": moved, "decoded_bytes": weight.nbytes}
