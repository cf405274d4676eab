"""The Triton kernels of the lossless ops as their launchers launch them, for GPUs that are not there (triton_quant_aot.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from fastloss.triton_kernels import crc32c, lossless_decode, lossless_linear, lossless_rows
from fastloss.triton_kernels.lossless_numbers import Plan, read_plan
from triton.runtime.jit import JITFunction

from fastloss.lossless.contract import (
    NUMBERS,
    P7_NUMBERS,
    SPLITS,
    Codec,
    Section,
    check_plan,
    section_bytes,
)
from triton_aot import Cost, measure
from triton_quant_aot import OPTIONS, QuantCase, _source

ROWS, COLUMNS = 4096, 4096
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}  # fmt: skip


def _plan(codec: Codec, dtype: torch.dtype, tiles: bool, coded: bool) -> Plan:
    """A blob without memory. `coded`: byte planes are streams."""
    number, numel = NUMBERS[dtype], ROWS * COLUMNS
    planes = SPLITS[number].byte_planes
    kinds = [Section.BITS] if SPLITS[number].bit_planes else []
    kinds += [Section(Section.BYTES0 + p) for p in range(0 if coded else planes)]
    if codec == Codec.P7:
        kinds += [Section(k) for k in range(5)]
    else:
        kinds += [Section(Section.FIELD_FREQUENCIES + k) for k in range(3 + 3 * planes * coded)]
    escapes = 100_000
    unknown = {Section.ESCAPE_POSITIONS: 2 * escapes, Section.ESCAPE_VALUES: 2 * escapes * dtype.itemsize}
    at, spans = 256, []
    for kind in Section:
        if kind in kinds:
            size = section_bytes(kind, codec, number, numel, dtype.itemsize) or unknown.get(kind, numel // 2)
            spans += [at, size]
            at += -(-size // 64) * 64
        else:
            spans += [0, 0]
    blob = torch.empty(at + 64, dtype=torch.uint8, device="meta")
    plan = [codec, number, int(tiles), numel, ROWS, COLUMNS, *spans]
    check_plan(blob, plan, dtype)
    return read_plan(blob, plan)


def _decode(dtype: torch.dtype, codec: Codec, tiles: bool = False, coded: bool = False, first: int = 0) -> None:
    lossless_decode.lossless_decode(_plan(codec, dtype, tiles, coded), first, ROWS * COLUMNS - 64 * first, dtype)


def _rows(dtype: torch.dtype, codec: Codec) -> None:
    index = torch.empty(4096, dtype=torch.int64, device="meta")
    lossless_rows.lossless_rows(_plan(codec, dtype, False, False), index, dtype)


def _linear(dtype: torch.dtype, batch: int, tiles: bool) -> None:
    x = torch.empty(batch, COLUMNS, dtype=dtype, device="meta")
    lossless_linear.lossless_linear(x, _plan(Codec.P7, dtype, tiles, False), x.new_empty(ROWS))


def _crc(dtype: torch.dtype) -> None:
    size = ROWS * COLUMNS * dtype.itemsize
    tables = [torch.empty(n, dtype=torch.int32, device="meta") for n in (1024, crc32c.LANES, crc32c.POWERS)]
    crc32c.crc32c(torch.empty(size, dtype=torch.uint8, device="meta"), 16384 * dtype.itemsize, (1, 2), tuple(tables))


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "p7 rows": lambda t: _decode(t, Codec.P7),
    "p7 rows from an odd number": lambda t: _decode(t, Codec.P7, first=77),
    "p7 tiles": lambda t: _decode(t, Codec.P7, tiles=True),
    "r8": lambda t: _decode(t, Codec.R8),
    "r8 coded planes": lambda t: _decode(t, Codec.R8, coded=True),
    "gather p7": lambda t: _rows(t, Codec.P7),
    "gather r8": lambda t: _rows(t, Codec.R8),
    "linear 1": lambda t: _linear(t, 1, False),
    "linear 2 tiles": lambda t: _linear(t, 2, True),
    "linear 16": lambda t: _linear(t, 16, False),
    "linear 16 tiles": lambda t: _linear(t, 16, True),
    "linear 64": lambda t: _linear(t, 64, False),
    "linear 64 tiles": lambda t: _linear(t, 64, True),
    "crc32c": _crc,
}


def takes(name: str, dtype: str) -> bool:
    """Whether there is such a launch for the dtype."""
    if name.startswith("linear"):
        return dtype in ("bf16", "fp16")
    if "p7" in name:
        return NUMBERS[DTYPES[dtype]] in P7_NUMBERS
    return True


def compile_lossless_case(case: QuantCase) -> dict[str, Cost]:
    """Build every kernel that the case launches, and take the machine code apart; of several launches, what spills most."""
    made: list[tuple[str, Any, dict[str, Any]]] = []

    def write_down(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        made.append((self.fn.__name__, _source(self, given), {k: v for k, v in kwargs.items() if k in OPTIONS}))

    with mock.patch.object(JITFunction, "run", write_down):
        CALLS[case.name](DTYPES[case.dtype])
    costs: dict[str, Cost] = {}
    for name, code, options in made:
        cost = measure(code, case.target, options)
        if name not in costs or cost.spilled > costs[name].spilled:
            costs[name] = cost
    return costs
