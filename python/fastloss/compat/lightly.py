"""lightly's `NTXentLoss`, `DCLLoss` and `DCLWLoss` without their four blocks of similarities.

All of them divide the embeddings by their norms. NT-Xent has the positive in its denominator, DCL has not. A memory
bank is read before the batch is added to it (pytorch-metric-learning's CrossBatchMemory adds first and then removes the
pairs with itself).

Differences from lightly: a temperature must be above 0 (lightly takes any but 0); the bank is used in the dtype of the
embeddings (lightly fails for float64); the place in the bank is kept on the host, so that no step waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contrastive.distributed import gather_keys, place
from ..pairs import Diagonal, PairStats, SameId, pair_nll, pair_stats
from ..pairs.statistics import softplus

WeightFunction = Callable[[Tensor, Tensor], Tensor]


def _check_views(out0: Tensor, out1: Tensor) -> None:
    if out0.dim() != 2 or out0.shape != out1.shape:
        raise ValueError(f"out0 and out1 must have one shape [B, D], got {list(out0.shape)} and {list(out1.shape)}")


def _check_temperature(temperature: float) -> None:
    if not temperature >= 1e-8:
        raise ValueError(f"temperature must be >= 1e-8, got {temperature}")


def _check_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError("gather_distributed=True needs a torch with torch.distributed")


def _view_stats(out0: Tensor, out1: Tensor, temperature: float, gather_distributed: bool) -> PairStats:
    """The statistics of the 2 B rows of both views, against both views of all ranks: positive is the other view of the
    same sample, and a row itself is no pair."""
    batch, (rank, world_size) = len(out0), place()
    rows = torch.cat((out0, out1))
    if not gather_distributed or world_size == 1:
        both = Diagonal(batch, -batch)
        return pair_stats(rows, scale=1 / temperature, positive=both, columns=False, normalize=True)
    columns = torch.cat((gather_keys(out0), gather_keys(out1)))
    ids = torch.arange(len(columns), dtype=torch.int32, device=rows.device)
    first = ids[rank * batch : (rank + 1) * batch]
    second = first + world_size * batch
    return pair_stats(
        rows, columns, scale=1 / temperature, columns=False, normalize=True,
        positive=SameId(torch.cat((second, first)), ids), excluded=SameId(torch.cat((first, second)), ids),
    )  # fmt: skip


class MemoryBank(nn.Module):
    """The last embeddings of a ring of `size[0]` rows; random unit vectors at first. Not part of the state dict, as in
    lightly.

    A batch that reaches the end of the ring fills it as far as it goes, the rest of the batch is dropped, and the next
    batch begins at row 0.
    """

    bank: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if any(s < 0 for s in sizes) or (sizes != (0,) and len(sizes) != 2):
            raise ValueError(f"memory_bank_size must be 0 (no bank) or (rows, dimension), both >= 0; got {size}")
        self.size, self.gather_distributed = sizes, gather_distributed
        bank = torch.empty(sizes) if sizes == (0,) else F.normalize(torch.randn(sizes), dim=-1)
        self.register_buffer("bank", bank, persistent=False)
        self.bank_ptr = 0

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Write the batch, of all ranks where they are gathered, over the oldest rows."""
        if self.gather_distributed:
            batch = gather_keys(batch, gradient=False)
        start, rows = self.bank_ptr, len(self.bank)
        written = min(len(batch), rows - start)
        self.bank[start : start + written] = batch[:written]
        self.bank_ptr = 0 if start + len(batch) >= rows else start + len(batch)


class NTXentLoss(nn.Module):
    """mean of -log( e^(s_i+ / t) / (e^(s_i+ / t) + sum over the negatives of e^(s_ij / t)) ), s cosines.

    Without a bank, over the 2 B rows of both views: the positive is the other view, the negatives are the 2 B - 2
    others (of all ranks with `gather_distributed`). With a bank, over the B rows of out0: the positive is that row of
    out1, the negatives are the bank, to which out1 is added afterwards where gradients are wanted.

    Args:
        temperature: t.
        memory_bank_size: 0, or (rows, dimension).
        gather_distributed: negatives of all ranks; with a bank, their batches are added to it. The gradients of
            gathered embeddings are summed over the ranks.

    Source: A Simple Framework for Contrastive Learning of Visual Representations; with a bank, Momentum Contrast for
    Unsupervised Visual Representation Learning.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        _check_distributed(gather_distributed)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [B, D]."""
        _check_views(out0, out1)
        if self.memory_bank.size[0] == 0 and not self.gather_distributed:
            both, batch = torch.cat((out0, out1)), len(out0)
            return pair_nll(both, scale=1 / self.temperature, positive=Diagonal(batch, -batch), normalize=True)[
                0
            ].mean()
        if self.memory_bank.size[0] == 0:
            return _view_stats(out0, out1, self.temperature, self.gather_distributed).nll.mean()
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        queue = self.memory_bank.bank.to(out0.dtype, copy=True)  # the backward reads it after the batch was added
        negative = pair_stats(out0, queue, scale=1 / self.temperature, positive=None, columns=False).neg_lse
        if out0.requires_grad:
            self.memory_bank.add(out1)
        own = (out0 * out1).sum(1, dtype=negative.dtype) / self.temperature
        return softplus(negative - own).mean()


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - B softmax_i(<out0_i, out1_i> / sigma), [B], without a gradient: near 1 for all, less for pairs that agree."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """mean over the 2 B rows of both views of log sum over the negatives of e^(s_ij / t) - w_i s_i+ / t, s cosines: the
    positive is not in the denominator, so the loss may be negative.

    Args:
        temperature: t.
        weight_fn: w = weight_fn(out0, out1) of the normalised views [B, D] for the rows of out0, weight_fn(out1, out0)
            for those of out1; None: 1. Its gradient is computed.
        gather_distributed: negatives of all ranks. A weight sees its own rank's batch only.

    A batch of one sample on one rank has no negatives: its loss is -inf, as in lightly.
    Source: Decoupled Contrastive Learning.
    """

    def __init__(
        self, temperature: float = 0.1, weight_fn: WeightFunction | None = None, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        _check_distributed(gather_distributed)
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [B, D]."""
        _check_views(out0, out1)
        stats = _view_stats(out0, out1, self.temperature, self.gather_distributed)
        attraction = stats.pos_sum
        if self.weight_fn is not None:
            unit0, unit1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
            attraction = torch.cat((self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0))) * attraction
        return (stats.neg_lse - attraction).mean()


class DCLWLoss(DCLLoss):
    """`DCLLoss` weighted by `negative_mises_fisher_weights` of `sigma`. Source: Decoupled Contrastive Learning."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be finite and > 0, got {sigma}")
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
