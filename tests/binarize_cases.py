"""What the tests of `binarize` share: surrogates with their numbers, declared functions, layouts and hard numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.quant.contract import Surrogate


class Case(NamedTuple):
    """A surrogate with its numbers, the function F that it declares, and where |u| has a kink."""

    kind: Surrogate
    p0: float
    p1: float
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()

    @property
    def numbers(self) -> tuple[int, float, float]:
        return int(self.kind), self.p0, self.p1

    @property
    def name(self) -> str:
        return f"{self.kind.name.lower()}-{self.p0:g}-{self.p1:g}"

    @property
    def ends(self) -> bool:
        """Whether the slope is 0 beyond some |u|, so that codes hold it."""
        return self.kind not in (Surrogate.IDENTITY, Surrogate.BIPER)


def _reste(order: float, limit: float) -> Case:
    def function(u: Tensor) -> Tensor:
        a = u.abs().clamp(max=limit)
        return u.sign() * torch.where(a <= 0.1, 0.1 ** (1 / order) / 0.1 * a, a.clamp(min=0.1) ** (1 / order))

    return Case(Surrogate.RESTE, order, limit, function, (0.1, limit))


def _biper(frequency: float) -> Case:
    return Case(Surrogate.BIPER, frequency, 0.0, lambda u: torch.sin(frequency * u))


def _swish(sharpness: float) -> Case:
    def function(u: Tensor) -> Tensor:
        s = torch.sigmoid(sharpness * u)
        return 2 * s * (1 + sharpness * u * (1 - s)) - 1

    return Case(Surrogate.SWISH, sharpness, 0.0, function)


def _fda(frequency: float, terms: int) -> Case:
    def function(u: Tensor) -> Tensor:
        inside = u.clamp(-1, 1)
        waves = [torch.sin((2 * i + 1) * frequency * inside) / (2 * i + 1) for i in range(terms + 1)]
        return 4 / math.pi * torch.stack(waves).sum(0)

    return Case(Surrogate.FDA, frequency, float(terms), function, (1.0,))


def _clip(limit: float) -> Case:
    return Case(Surrogate.CLIP, limit, 0.0, lambda u: u.clamp(-limit, limit), (limit,))


def _approx(u: Tensor) -> Tensor:
    inside = u.clamp(-1, 1)
    return 2 * inside - inside * inside.abs()


CASES = (
    Case(Surrogate.IDENTITY, 0.0, 0.0, lambda u: u),
    _clip(1.0), _clip(0.3),
    Case(Surrogate.APPROX, 0.0, 0.0, _approx, (1.0,)),
    _reste(3.0, 1.5), _reste(1.0, 1.5), _reste(1.37, 40.0),
    _biper(20.0), _biper(300.0),
    _swish(5.0), _swish(0.3),
    _fda(0.1, 9), _fda(0.1, 18), _fda(20.0, 12), _fda(3.0, 0),
)  # fmt: skip
NAMES = [case.name for case in CASES]
#: One of each kind.
KINDS = tuple(next(case for case in CASES if case.kind == kind) for kind in Surrogate)
KIND_NAMES = [case.kind.name.lower() for case in KINDS]

HARD = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 1.0, -1.0, 1.5, -1.5, 0.5, 65504.0, 1e-7)
#: (groups, inner) for a matrix: one, rows, columns, channels in a row, and what divides nothing.
LAYOUTS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "one": lambda rows, columns: (1, 1),
    "rows": lambda rows, columns: (rows, columns),
    "columns": lambda rows, columns: (columns, 1),
    "channels": lambda rows, columns: (max(1, columns // 7), 7),
    "odd": lambda rows, columns: (5, 11),
}


def numbers(rows: int, columns: int, dtype: torch.dtype, hard: bool = True) -> Tensor:
    """Normal numbers, hard ones strewn in."""
    x = torch.randn(rows, columns)
    if hard:
        at = torch.randint(columns, (rows, 1 + columns // 12))
        x = x.scatter(1, at, torch.tensor(HARD)[torch.randint(len(HARD), at.shape)])
    return x.to(dtype)


def parameters(layout: str, rows: int, columns: int) -> tuple[Tensor | None, Tensor, int, int]:
    """(shift, scale, groups, inner); no shift where there is one group, and one for all groups where the layout is odd,
    which is allowed too."""
    groups, inner = LAYOUTS[layout](rows, columns)
    shift = torch.randn(1 if layout == "odd" else groups) / 8
    return None if layout == "one" else shift, torch.rand(groups) + 0.5, groups, inner
