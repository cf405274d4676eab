"""A cache of keys and values whose older tokens have fewer bits (SAQ)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)

_ops = torch.ops.fastloss
_WIDTHS = (1, 2, 4, 8)


class _Packed(NamedTuple):
    """Groups of neighbours along the last dimension of a tensor, quantised."""

    codes: Tensor  # uint8 [G, group bits / 8]
    low: Tensor  # [G]
    step: Tensor  # [G]
    bits: int
    group: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes


def _quantize(x: Tensor, group: int, bits: int) -> _Packed:
    flat = x.contiguous().reshape(-1)
    if bits >= 4:
        codes, low, step = _ops.quantize_groups.default(flat, group, bits)
    else:  # the codec has 4 and 8 bits: a range widened so that the group's own ends at code 2^bits - 1, four or eight a byte
        groups = flat.float().reshape(-1, group)
        low, high = groups.amin(1), groups.amax(1)
        high = low + (high - low) * (255 / (2**bits - 1))
        codes, low, step = _ops.quantize_groups.default(flat, group, 8, low, high)
        codes = codes.clamp(max=2**bits - 1)
        shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
        codes = (codes.unflatten(1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
    return _Packed(codes, low, step, bits, group, x.shape, x.dtype)


def _restore(p: _Packed) -> Tensor:
    codes, bits = p.codes, p.bits
    if bits < 4:
        shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
        codes, bits = (codes[..., None] >> shifts & (2**bits - 1)).flatten(1), 8
    made = _ops.dequantize_groups.default(codes, p.low, p.step, p.shape.numel(), p.group, bits, p.dtype)
    return made.reshape(p.shape)


class StaircaseCache:
    """Keys and values of one attention layer: the last tokens as they are, older ones in chunks of fewer and fewer bits.

        up to `chunk` last tokens: full precision. When there are `chunk` of them they become a chunk of bits[0]; the
        chunks before it each go one step down, bits[0] -> bits[1] -> ..; those of bits[-1] stay.

    A step down quantises what the step above gave back: with ranges of a group, errors up to half a step of each add.
    Keys have groups of `group` tokens of one channel, values groups of `group` channels of one token, each with its own
    minimum and maximum (`quantize_groups`).

    Args:
        bits: the steps, falling, each 8, 4, 2 or 1. chunk: tokens, a multiple of `group`. group: numbers that share a
            range, a multiple of 8; the head's dimension must be one of it.

    The paper gives neither bits nor sizes; KIVI's layout of groups is assumed.
    Source: "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI".
    """

    def __init__(self, bits: Sequence[int], chunk: int = 128, group: int = 32) -> None:
        steps = tuple(bits)
        if not steps or any(b not in _WIDTHS for b in steps) or any(b <= c for b, c in itertools.pairwise(steps)):
            raise ValueError(f"bits must fall, each one of {_WIDTHS}, got {steps}")
        if group < 8 or group % 8 or chunk < group or chunk % group:
            raise ValueError(f"group must be a multiple of 8 and divide chunk, got {group} and {chunk}")
        self.bits, self.chunk, self.group = steps, chunk, group
        self._chunks: list[tuple[_Packed, _Packed]] = []
        self._recent: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Tokens held."""
        recent = 0 if self._recent is None else self._recent[0].shape[-2]
        return len(self._chunks) * self.chunk + recent

    @property
    def nbytes(self) -> int:
        """Bytes of codes, ranges and recent tokens."""
        recent = 0 if self._recent is None else sum(t.numel() * t.element_size() for t in self._recent)
        return recent + sum(k.nbytes + v.nbytes for k, v in self._chunks)

    @property
    def chunk_bits(self) -> list[int]:
        """The bits of each chunk, the oldest first."""
        return [keys.bits for keys, _ in self._chunks]

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add T tokens: keys [..., T, D] and values [..., T, E], floating.

        Raises ValueError and TypeError for what does not fit each other or what is held; then nothing has changed.
        """
        self._check(keys, values)
        new = (keys.detach(), values.detach())
        recent = (
            tuple(t.clone() for t in new)
            if self._recent is None
            else tuple(torch.cat(pair, -2) for pair in zip(self._recent, new, strict=True))
        )
        while recent[0].shape[-2] >= self.chunk:
            first, recent = zip(*(t.tensor_split([self.chunk], -2) for t in recent), strict=True)
            self._push(*first)
        self._recent = tuple(t.clone() for t in recent)  # type: ignore[assignment]  # clones: not views of what was long

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, t in (("keys", keys), ("values", values)):
            if not t.is_floating_point():
                raise TypeError(f"{name} must be floating, got {t.dtype}")
        if keys.dim() < 2 or keys.shape[:-1] != values.shape[:-1] or keys.device != values.device:
            raise ValueError(
                f"keys and values must be [..., T, D] and [..., T, E] on one device, got {list(keys.shape)} and "
                f"{list(values.shape)}"
            )
        if values.shape[-1] % self.group:
            raise ValueError(f"values must have a multiple of {self.group} channels, got {values.shape[-1]}")
        for t, held in zip((keys, values), self._recent or (), strict=False):
            same = t.shape[:-2] == held.shape[:-2] and t.shape[-1] == held.shape[-1]
            if not same or t.dtype != held.dtype or t.device != held.device:
                raise ValueError(
                    f"the cache holds {held.dtype} [{list(held.shape[:-2])}, T, {held.shape[-1]}] on {held.device}, got "
                    f"{t.dtype} {list(t.shape)} on {t.device}"
                )

    def _push(self, keys: Tensor, values: Tensor) -> None:
        stepped = []
        for pair in self._chunks:
            at = self.bits.index(pair[0].bits)
            if at + 1 < len(self.bits):
                pair = tuple(_quantize(_restore(p), p.group, self.bits[at + 1]) for p in pair)  # type: ignore[assignment]
            stepped.append(pair)
        packed = (
            _quantize(keys.transpose(-1, -2), self.group, self.bits[0]),
            _quantize(values, self.group, self.bits[0]),
        )
        self._chunks = [*stepped, packed]

    def read(self) -> tuple[Tensor, Tensor]:
        """(keys [..., T, D], values [..., T, E]) of all tokens, the oldest first, in the dtype given. ValueError where
        nothing was added."""
        if self._recent is None:
            raise ValueError("the cache is empty: append keys and values first")
        keys = [_restore(k).transpose(-1, -2) for k, _ in self._chunks]
        values = [_restore(v) for _, v in self._chunks]
        return torch.cat([*keys, self._recent[0]], -2), torch.cat([*values, self._recent[1]], -2)
