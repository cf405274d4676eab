"""Lossless weights: decoding against a copy of the output, ZipNN and zstd; encoding; products and gathers on the blob."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Group
from fastloss import lossless
from implementations import CASES, Call, Case, ours


def _weights(group: Group) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(*group.shape, device=group.device) * 0.02).to(group.torch_dtype)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _zipnn(dtype: torch.dtype) -> Any:
    """ZipNN's coder for byte strings of this dtype with one thread, or None where it is not installed."""
    module = _module("zipnn")
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    if module is None or dtype not in names:
        return None
    return module.ZipNN(input_format="byte", bytearray_dtype=names[dtype], threads=torch.get_num_threads())


def decompress(group: Group) -> Case:
    """A matrix of normal weights back into memory that is there already; mode: codec, and "checked" with its checksums."""
    codec, _, verify = group.mode.partition("_")
    x = _weights(group)
    packed, out, copy = lossless.compress(x, codec), torch.empty_like(x), torch.empty_like(x)
    calls: dict[str, Call] = {"copy": lambda: copy.copy_(x)}
    if group.device == "cpu":
        if (coder := _zipnn(x.dtype)) is not None:
            coded = coder.compress(bytearray(_bytes(x)))
            calls["zipnn"] = lambda: coder.decompress(coded)
        if (zstd := _module("zstandard")) is not None:
            frame = zstd.ZstdCompressor(3).compress(_bytes(x))
            calls["zstd_3"] = lambda: zstd.ZstdDecompressor().decompress(frame)
    calls |= ours(group.device, lambda: lossless.decompress(packed, out=out, verify="full" if verify else "off"))
    share = {"share": round(packed.nbytes / (x.numel() * x.element_size()), 4)}
    return Case(calls, (), x.numel() * x.element_size(), 0, extra=share)


def compress(group: Group) -> Case:
    """The other way round; bytes are those of the input."""
    x = _weights(group)
    calls: dict[str, Call] = {}
    if group.device == "cpu":
        raw = _bytes(x)
        if (coder := _zipnn(x.dtype)) is not None:
            calls["zipnn"] = lambda: coder.compress(bytearray(raw))  # it changes what it is given
        if (zstd := _module("zstandard")) is not None:
            calls["zstd_3"] = lambda: zstd.ZstdCompressor(3).compress(raw)
    calls |= ours(group.device, lambda: lossless.compress(x, group.mode))
    return Case(calls, (), x.numel() * x.element_size(), 0)


def compressed_linear(group: Group) -> Case:
    """M rows of bf16 times a P7 matrix [N, K] that is never decoded; "torch" reads the dense one."""
    m, n, k = group.shape
    torch.manual_seed(0)
    w = (torch.randn(n, k, device=group.device) * 0.02).to(group.torch_dtype)
    x = torch.randn(m, k, device=group.device).to(group.torch_dtype)
    packed = lossless.compress(w, "p7", layout="tiles" if group.device == "cuda" else "rows")
    calls: dict[str, Call] = {
        "torch": lambda: F.linear(x, w),
        "decompress_torch": lambda: F.linear(x, lossless.decompress(packed, verify="off")),
        **ours(group.device, lambda: torch.ops.fastloss.lossless_linear(x, packed.blob, packed.plan)),
    }
    return Case(calls, (), packed.nbytes, 2 * m * n * k)


def compressed_rows(group: Group) -> Case:
    """2,048 rows of a P7 or R8 table; "torch" gathers from the dense one."""
    x = _weights(group)
    index = torch.randint(0, x.shape[0], (2048,), device=group.device)
    packed = lossless.compress(x, group.mode)
    calls: dict[str, Call] = {
        "torch": lambda: F.embedding(index, x),
        **ours(group.device, lambda: packed.rows(index)),
    }
    return Case(calls, (), 2048 * x.shape[1] * x.element_size(), 0)


_ALL: dict[str, Callable[[Group], Case]] = {
    "decompress": decompress,
    "compress": compress,
    "compressed_linear": compressed_linear,
    "compressed_rows": compressed_rows,
}
CASES |= _ALL
