"""Which pairs are positive or excluded, in a user's words: `Diagonal`, `SameId`, `PairMask`, and `Guide`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import can_look

_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True, init=False)
class Diagonal:
    """The pairs (i, i + offset), for one offset or two: `Diagonal()` is row i with column i."""

    offsets: tuple[int, ...]

    def __init__(self, *offsets: int) -> None:
        for offset in offsets:
            if not isinstance(offset, int):
                raise TypeError(f"Diagonal takes integers, got {offset!r}")
            if abs(offset) >= 2**62:
                raise ValueError(f"Diagonal takes offsets below 2^62, got {offset}")
        object.__setattr__(self, "offsets", offsets or (0,))


@dataclass(frozen=True)
class SameId:
    """The pairs whose ids are equal: labels of classes, of documents, of views. rows: integers [M]; columns: [N], None for the
    ids of the rows (then M = N)."""

    rows: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True)
class PairMask:
    """The pairs that a mask names: bool [M, N], or packed 32 columns to an int32 [M, ceil(N / 32)], the lowest bit first."""

    mask: Tensor


PairSet = Diagonal | SameId | PairMask
PairSets = PairSet | Sequence[PairSet] | None


@dataclass(frozen=True)
class Guide:
    """A second pair of embeddings that says which negatives are false: (i, j) is dropped where <q_i, k_j> > limit_i.

    q: [M, E]; k: [N, E]; limit: [M] or a number, in units of the guide's dot product (normalise the guide for cosines).
    No gradient flows into a guide. (GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning.)
    """

    q: Tensor
    k: Tensor
    limit: Tensor | float


class Members(NamedTuple):
    """A class in the fields of the pair contract."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    diagonals: tuple[int, ...] = ()


def _ids(name: str, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ids that are equal where the given ones are."""
    for x in (rows, columns):
        if x.is_floating_point() or x.is_complex():
            raise TypeError(f"{name} ids must be integers, got {x.dtype}")
    small = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    if rows.dtype in small and columns.dtype in small:
        return rows.int(), columns.int()
    both = torch.cat((rows.long(), columns.long()))
    if can_look(both) and (not both.numel() or (both.min() >= _INT32.min and both.max() <= _INT32.max)):
        return rows.int(), columns.int()
    ranks = torch.searchsorted(both.sort().values, both).int()  # nothing of data-dependent shape: no wait for a GPU
    return ranks[: len(rows)], ranks[len(rows) :]


def _bits(mask: Tensor) -> Tensor:
    """Pack bool [M, N] into int32 [M, ceil(N / 32)], the lowest bit first."""
    m, n = mask.shape
    words = -(-n // 32)
    out = mask.new_empty((m, words), dtype=torch.int32)
    weight = (2 ** torch.arange(31, device=mask.device)).to(torch.int32)
    weight = torch.cat((weight, weight.new_full((1,), _INT32.min)))
    step = max(1, (1 << 20) // max(n, 1))
    for start in range(0, m, step):
        part = torch.nn.functional.pad(mask[start : start + step], (0, words * 32 - n))
        out[start : start + step] = (part.view(len(part), words, 32) * weight).sum(2, dtype=torch.int32)
    return out


def _check_length(name: str, ids: Tensor, length: int) -> None:
    if ids.shape != (length,):
        raise ValueError(f"{name} ids must have shape [{length}], got {list(ids.shape)}")


def members(name: str, sets: PairSets, m: int, n: int, device: torch.device) -> Members:
    """The union of `sets`. Raises ValueError or TypeError for what is no class of an M x N matrix."""
    if isinstance(sets, (Tensor, str)):
        said = f"a tensor {list(sets.shape)}: wrap it in PairMask or SameId" if isinstance(sets, Tensor) else repr(sets)
        raise TypeError(f"{name} must be Diagonal, SameId or PairMask, several of them, or None; got {said}")
    given = () if sets is None else (sets,) if isinstance(sets, (Diagonal, SameId, PairMask)) else tuple(sets)
    rows = columns = None
    diagonals: tuple[int, ...] = ()
    for s in given:
        if isinstance(s, Diagonal):
            diagonals = tuple(dict.fromkeys((*diagonals, *s.offsets)))
            continue
        if rows is not None:
            raise ValueError(f"{name} takes one SameId or one PairMask beside diagonals: write the union as a PairMask")
        if isinstance(s, SameId):
            _check_length(f"{name} row", s.rows, m)
            _check_length(f"{name} column", s.rows if s.columns is None else s.columns, n)
            rows, columns = _ids(name, s.rows, s.rows if s.columns is None else s.columns)
        elif isinstance(s, PairMask):
            if s.mask.dtype == torch.bool:
                if s.mask.shape != (m, n):
                    raise ValueError(f"{name} mask must have shape [{m}, {n}], got {list(s.mask.shape)}")
                rows = _bits(s.mask)
            elif s.mask.dtype == torch.int32:
                if s.mask.shape != (m, -(-n // 32)):
                    raise ValueError(f"{name} bits must have shape [{m}, {-(-n // 32)}], got {list(s.mask.shape)}")
                rows = s.mask.contiguous()
            else:
                raise TypeError(f"{name} mask must be torch.bool, or packed torch.int32; got {s.mask.dtype}")
        else:
            raise TypeError(f"{name} must be Diagonal, SameId or PairMask, several of them, or None; got {s!r}")
    for x in (rows, columns):
        if x is not None and x.device != device:
            raise ValueError(f"{name} is on {x.device}, the embeddings on {device}")
    if len(diagonals) > 2:
        raise ValueError(f"{name} takes two diagonals at most (without k, 0 is one of the excluded), got {diagonals}")
    return Members(rows, columns, diagonals)
