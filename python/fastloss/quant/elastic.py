"""One quantiser of many settings: the state of an elastic supernet's layer (EQ-Net)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .fake_quant import fake_quant
from .scales import SMALLEST_STEP, absmax_scale, minmax_scale, searched_scale

GRANULARITIES = ("tensor", "row", "group")


class ElasticQuantizer(nn.Module):
    """`fake_quant` with a step (and an offset) of its own for each of bits x symmetry x granularity.

    "EQ-Net: Elastic Quantization Neural Networks". Of each call only the parameters of its setting get gradients. The
    magnitude of a step is used, so that an update across 0 stays a quantiser.

    Args:
        x: the numbers that the first steps are made of; later inputs need the same size of `dim` (row) and of the last
            dimension (group).
        bits: the choices of bits, 2 to 8.
        symmetric: the choices of symmetry: True, levels -2^(bits-1) .. 2^(bits-1) - 1; False, 0 .. 2^bits - 1 and an offset.
        granularity: the choices among "tensor", "row" (each index of `dim`) and "group" (`group` neighbours of the last
            dimension).
        dim, group: what a row and a group are.
        search: EQ-Net's search of the first steps (80 passes over x) instead of the whole range.
        grad_factor: of `fake_quant`.
    """

    def __init__(
        self,
        x: Tensor,
        bits: Iterable[int] = range(2, 9),
        symmetric: Iterable[bool] = (True, False),
        granularity: Iterable[str] = ("tensor", "row"),
        *,
        dim: int = 0,
        group: int = 0,
        search: bool = False,
        grad_factor: str | float | None = "lsq",
    ) -> None:
        super().__init__()
        self.dim, self.group, self.grad_factor = dim, group, grad_factor
        self.bits, self.symmetric, self.granularity = tuple(bits), tuple(symmetric), tuple(granularity)
        if not self.bits or any(b != int(b) or not 2 <= b <= 8 for b in self.bits):
            raise ValueError(f"bits must be choices of 2 to 8, got {self.bits}")
        if not self.granularity or any(g not in GRANULARITIES for g in self.granularity):
            raise ValueError(f"granularity must be choices of {', '.join(GRANULARITIES)}, got {self.granularity}")
        if "group" in self.granularity and group < 1:
            raise ValueError(f'granularity "group" needs group >= 1, got {group}')
        if not self.symmetric:
            raise ValueError("symmetric must hold True, False or both, got nothing")
        self.scales, self.offsets = nn.ParameterDict(), nn.ParameterDict()
        for g in self.granularity:
            for b in self.bits:
                for even in self.symmetric:
                    scale, offset = self._first(x, b, even, self._where(g), search)
                    key = self._key(b, even, g)
                    self.scales[key] = nn.Parameter(scale)
                    if not even:
                        self.offsets[key] = nn.Parameter(offset)

    def _where(self, granularity: str) -> tuple[int | None, int]:
        return {"tensor": (None, 0), "row": (self.dim, 0), "group": (None, self.group)}[granularity]

    @staticmethod
    def _key(bits: int, symmetric: bool, granularity: str) -> str:
        return f"{granularity}_{'symmetric' if symmetric else 'asymmetric'}_{bits}"

    @staticmethod
    def _first(
        x: Tensor, bits: int, symmetric: bool, where: tuple[int | None, int], search: bool
    ) -> tuple[Tensor, Tensor]:
        if search:
            return searched_scale(x, bits, symmetric, *where)
        if symmetric:
            scale = absmax_scale(x, bits, "lsq", *where)
            return scale, torch.zeros_like(scale)
        return minmax_scale(x, bits, *where)

    def parameters_of(self, bits: int, symmetric: bool, granularity: str) -> tuple[Tensor, Tensor | None]:
        """(scale, offset) of a setting, the offset None where it is symmetric; ValueError for one that was not asked for."""
        key = self._key(bits, symmetric, granularity)
        if key not in self.scales:
            raise ValueError(
                f"bits {bits}, symmetric {symmetric}, granularity {granularity!r} is no setting of this quantiser: bits "
                f"{self.bits}, symmetric {self.symmetric}, granularity {self.granularity}"
            )
        return self.scales[key], None if symmetric else self.offsets[key]

    def forward(self, x: Tensor, bits: int, symmetric: bool = True, granularity: str = "tensor") -> Tensor:
        """x at the levels of that setting, in x's dtype."""
        scale, offset = self.parameters_of(bits, symmetric, granularity)
        dim, group = self._where(granularity)
        return fake_quant(
            x, scale.abs().clamp(min=SMALLEST_STEP), bits=bits, signed=symmetric, offset=offset, dim=dim, group=group,
            grad_factor=self.grad_factor,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, granularity={self.granularity}"
