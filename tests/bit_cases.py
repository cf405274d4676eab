"""Rows of integers of every kind as planes of bits, and their products in int64: what tests of products compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss import backend_cpp
from fastloss.compiled import _C
from fastloss.quant import cpp_bgemm
from fastloss.quant.contract import row_bytes


class Kind(NamedTuple):
    """What planes of bits mean."""

    weights: tuple[int, ...]
    offset: int


BINARY, TERNARY = Kind((2,), -1), Kind((-1, 2), 0)
KINDS = {
    "binary": BINARY,
    "zero-one": Kind((1,), 0),
    "ternary": TERNARY,
    "2 bits": Kind((1, 2), -2),
    "3 bits": Kind((1, 2, 4), 0),
    "4 bits": Kind((1, 2, 4, 8), -8),
    "odd levels": Kind((2, 4), -3),
    "odd levels of 4 bits": Kind((2, 4, 8, 16), -15),
    "any weights": Kind((3, -50, 70), 4),
    "largest": Kind((127,), 0),
    "smallest": Kind((-127,), 0),
}

#: Name -> (isa of csrc/cpu/cpu.h, engine of csrc/cpu/bit_products.h).
PATHS = {
    "scalar": (0, 0), "avx2": (1, 0), "avx512": (2, 0), "popcount": (2, 1), "vnni": (2, 2), "amx": (2, 3), "best": (-1, -1),
}  # fmt: skip


def has_path(name: str) -> bool:
    """Whether this machine can run it."""
    isa, engine = PATHS[name]
    return isa <= _C.best_isa() and (engine < 0 or _C.has_bit_engine(engine))  # type: ignore[union-attr]


def every_path() -> Iterator[str]:
    """Forces each path that this machine has in turn; afterwards it is the best one again."""
    try:
        for name, (isa, engine) in PATHS.items():
            if has_path(name):
                backend_cpp.ISA, cpp_bgemm.ENGINE = isa, engine
                yield name
    finally:
        backend_cpp.ISA = cpp_bgemm.ENGINE = -1


class Rows(NamedTuple):
    """Rows of integers: packed, and as they are."""

    planes: Tensor
    popcounts: Tensor
    values: Tensor  # int64 [R, K]
    kind: Kind

    def first(self, count: int) -> Rows:
        return Rows(
            self.planes[:, :count].contiguous(), self.popcounts[:, :count].contiguous(), self.values[:count], self.kind
        )


def rows_of(bits: Tensor, kind: Kind) -> Rows:
    """bool [P, R, K] -> rows; a ternary number is positive only where it is not zero."""
    if kind == TERNARY:
        bits = torch.stack((bits[0], bits[0] & bits[1]))
    planes, rows, columns = bits.shape
    padded = torch.zeros(planes, rows, row_bytes(columns), 8, dtype=torch.uint8)
    padded.flatten(2)[..., :columns] = bits
    packed = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    weights = torch.tensor(kind.weights)[:, None, None]
    return Rows(packed, bits.sum(-1, dtype=torch.int32), kind.offset + (weights * bits).sum(0), kind)


def random_rows(count: int, columns: int, kind: Kind) -> Rows:
    return rows_of(torch.rand(len(kind.weights), count, columns) < 0.5, kind)


def arguments(a: Rows, b: Rows) -> tuple[object, ...]:
    """What the ops of products begin with."""
    return (
        a.planes, a.popcounts, b.planes, b.popcounts, a.values.shape[1], list(a.kind.weights), a.kind.offset,
        list(b.kind.weights), b.kind.offset,
    )  # fmt: skip


def product(a: Rows, b: Rows) -> Tensor:
    """a bᵀ in int64."""
    return a.values @ b.values.T
