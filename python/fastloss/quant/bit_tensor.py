"""Rows of low-bit integers as planes of bits: the one layout of all bit kernels (docs/design.md, "The bit
contract")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .contract import row_bytes


class BitTensor(NamedTuple):
    """Rows of integers, value = offset + sum over p of weights_p bit_p, times a scale.

    A named tuple of tensors and plain numbers, so that `torch.compile`, pytrees and `torch.save` / `torch.load` take
    it as it is.
    Made by `pack_bits`, `pack_ternary` and `pack_codes`; `unpack_bits` is the way back.

    Attributes:
        planes: uint8 [P, ..., B], B = 64 ceil(K / 512); bit k of a row is bit k mod 8 of byte k div 8, bits from K on
            are 0. Nothing checks that: with others, or with popcounts of other bits, results are wrong numbers, so
            what is cut to fewer columns has to be packed again.
        popcounts: int32 [P, ...], the ones of each row.
        scale: float32 [R, G] (R rows, or 1 for all; G groups of `group` columns, 1 if group is 0), or None for 1.
        columns: K.
        weights, offset: what a number is made of; (2,), -1 is binary, (-1, 2), 0 is ternary.
        group: columns that share a scale, a multiple of 64; 0: all.
    """

    planes: Tensor
    popcounts: Tensor
    scale: Tensor | None
    columns: int
    weights: tuple[int, ...]
    offset: int
    group: int = 0

    @property
    def shape(self) -> torch.Size:
        """[..., K], as unpacked."""
        return torch.Size((*self.planes.shape[1:-1], self.columns))

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return self.popcounts[0].numel()

    @property
    def device(self) -> torch.device:
        return self.planes.device

    @property
    def nbytes(self) -> int:
        """Bytes of planes, popcounts and scale."""
        return sum(t.nbytes for t in (self.planes, self.popcounts, self.scale) if t is not None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BitTensor:
        """The same numbers on another device."""
        planes, popcounts, scale = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.planes, self.popcounts, self.scale)
        )
        assert planes is not None and popcounts is not None
        return self._replace(planes=planes, popcounts=popcounts, scale=scale)

    def flat(self) -> tuple[Tensor, Tensor]:
        """(planes [P, R, B], popcounts [P, R]) as the ops take them."""
        count, width = len(self.weights), self.planes.shape[-1]
        return self.planes.reshape(count, -1, width), self.popcounts.reshape(count, -1)


def check_bits(name: str, bits: BitTensor) -> None:
    """Raise TypeError or ValueError unless `bits` has the layout that it says it has: kernels read by it."""
    if not isinstance(bits, BitTensor):
        raise TypeError(f"{name} must be a BitTensor (pack_bits makes one), got {type(bits).__name__}")
    planes, popcounts = bits.planes, bits.popcounts
    if planes.dtype != torch.uint8 or popcounts.dtype != torch.int32:
        raise TypeError(f"{name} must have uint8 planes and int32 popcounts, got {planes.dtype} and {popcounts.dtype}")
    wanted = (len(bits.weights), *bits.shape[:-1], row_bytes(bits.columns))
    if planes.dim() < 2 or tuple(planes.shape) != wanted or popcounts.shape != planes.shape[:-1]:
        raise ValueError(
            f"{name} of {bits.columns} columns must have planes [{len(bits.weights)}, ..., {row_bytes(bits.columns)}] and "
            f"popcounts without the last dimension, got {list(planes.shape)} and {list(popcounts.shape)}"
        )
    if bits.group % 64 or bits.group < 0:
        raise ValueError(f"{name}.group must be 0 or a multiple of 64, got {bits.group}")
    groups = -(-bits.columns // bits.group) if bits.group else 1
    if bits.scale is not None and (
        bits.scale.dim() != 2 or bits.scale.shape[0] not in (1, bits.rows) or bits.scale.shape[1] != groups
    ):
        raise ValueError(f"{name}.scale must be [{bits.rows} or 1, {groups}], got {list(bits.scale.shape)}")


torch.serialization.add_safe_globals([BitTensor])
