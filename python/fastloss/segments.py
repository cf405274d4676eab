"""Which tokens count, and which sequence each belongs to: padded batches and packed ones, under the same losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def segment_sum(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sum of the values of each segment: [count], 0 where a segment has none.

    values: any shape. segments: integer ids of the same shape, in [0, count); negative where a value belongs to none
    (it is then not read: NaN there changes nothing). Differentiable. Raises ValueError for shapes that differ,
    TypeError for ids that are no integers, IndexError (CPU) for an id of count or more.
    """
    _check_segments(segments, count)
    if values.shape != segments.shape:
        raise ValueError(f"values and segments must have one shape, got {tuple(values.shape)}, {tuple(segments.shape)}")
    bucket = (segments.to(torch.int64) + 1).clamp(min=0).reshape(-1)  # the first is thrown away, whatever is in it
    flat = values.reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):  # a sum in 16 bits stops growing: 256 + 1 is 256 in bfloat16
        flat = flat.float()
    return flat.new_zeros(count + 1).index_add(0, bucket, flat)[1:].to(values.dtype)


def segment_mean(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Mean of the values of each segment: [count], 0 where a segment has none. Arguments as in `segment_sum`."""
    exact = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    size = segment_sum(torch.ones_like(exact), segments, count)
    mean = segment_sum(exact, segments, count) / size.clamp(min=1)
    return mean.to(values.dtype) if values.is_floating_point() else mean


def segments_of_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """Segment ids [total] from cumulative lengths [0, l_1, l_1 + l_2, ...], as packed attention kernels take them.

    Tokens past the last length belong to no sequence: -1. The number of sequences is len(cu_seqlens) - 1.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    count = cu_seqlens.shape[0] - 1
    position = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens, position, right=True) - 1
    return torch.where(ids < count, ids, -1)


def _check_segments(segments: Tensor, count: int) -> None:
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise TypeError(f"segments must hold integer ids, got {segments.dtype}")
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")


@dataclass(frozen=True)
class Sequences:
    """What the `mask` of a loss on tokens may be besides a tensor: the tokens that count, and their sequences.

    Without segments the last dimension holds the tokens of a sequence (a padded batch [B, T]); with segments the ids
    say which sequence a token is of, whatever the shape (a packed batch).
    """

    mask: Tensor
    segments: Tensor | None = None
    count: int = 0

    @classmethod
    def packed(cls, segments: Tensor, count: int, mask: Tensor | None = None) -> Sequences:
        """Sequences 0 .. count - 1 by their ids; tokens of negative id, and those not in `mask`, do not count."""
        _check_segments(segments, count)
        known = segments >= 0
        return cls(known if mask is None else known & as_mask(mask, segments), segments, count)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, like: Tensor, mask: Tensor | None = None) -> Sequences:
        """The sequences of a packed batch: `like` is any tensor of its tokens' shape."""
        ids = segments_of_cu_seqlens(cu_seqlens, like.numel()).reshape(like.shape)
        return cls.packed(ids, cu_seqlens.shape[0] - 1, mask)

    @property
    def shape(self) -> torch.Size:
        """Shape of one number a sequence."""
        return self.mask.shape[:-1] if self.segments is None else torch.Size((self.count,))

    def only(self, mask: Tensor) -> Sequences:
        """The same sequences, of whose tokens those of `mask` count."""
        return replace(self, mask=self.mask & as_mask(mask, self.mask))

    def keep(self, tokens: Tensor) -> Tensor:
        """At least float32, and 0 on tokens that do not count: their value is never used, nor is their gradient."""
        if tokens.shape != self.mask.shape:
            raise ValueError(f"expected one number a token, {tuple(self.mask.shape)}, got {tuple(tokens.shape)}")
        return torch.where(self.mask, tokens.to(torch.promote_types(tokens.dtype, torch.float32)), 0.0)

    def sum(self, tokens: Tensor) -> Tensor:
        """Sum over the tokens of each sequence that count."""
        tokens = self.keep(tokens)
        return tokens.sum(-1) if self.segments is None else segment_sum(tokens, self.segments, self.count)

    def sizes(self, like: Tensor) -> Tensor:
        """Number of tokens of each sequence that count, in the dtype of `like`."""
        return self.sum(self.mask.to(like.dtype))

    def mean(self, tokens: Tensor) -> Tensor:
        """Mean over the tokens of each sequence that count; 0 where none does."""
        total = self.sum(tokens)
        return total / self.sizes(total).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """One number a token, from one a sequence (or from one a token, which is what a shape that is both means)."""
        if values.shape == self.mask.shape:
            return values
        if values.shape != self.shape:
            raise ValueError(
                f"expected one number a sequence, {tuple(self.shape)}, or a token, {tuple(self.mask.shape)}, "
                f"got {tuple(values.shape)}"
            )
        if self.segments is None:
            return values.unsqueeze(-1).expand(self.mask.shape)
        if not self.count:
            return values.new_zeros(self.mask.shape)
        return values[self.segments.clamp(min=0)]


def as_mask(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` as bool: True where a token counts."""
    if mask.shape != like.shape:
        raise ValueError(f"mask must have one entry a token, {tuple(like.shape)}, got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def sequences(mask: Tensor | Sequences | None, logp: Tensor) -> Sequences:
    """What a loss was told about its tokens, checked against the shape of their log-probabilities."""
    if not logp.is_floating_point():
        raise TypeError(f"log-probabilities must have a floating dtype, got {logp.dtype}")
    if not logp.dim():
        raise ValueError("log-probabilities must have a last dimension of tokens, got shape ()")
    if isinstance(mask, Sequences):
        as_mask(mask.mask, logp)
        return mask
    return Sequences(torch.ones_like(logp, dtype=torch.bool) if mask is None else as_mask(mask, logp))
