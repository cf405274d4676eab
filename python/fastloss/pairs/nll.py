"""-log of the share of the positives, of a whole table at once: what most contrastive losses are made of, and nine small
operations of autograd less than its composition, which at a few hundred rows cost more than the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import _differentiate, batched, forward_mode_active, functorch_active
from ..contract import PairStat


class _Nll(torch.autograd.Function):
    """softplus(neg_lse - pos_lse) of each row of a table, 0 in rows without positives."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, compose: Callable[[Tensor], Tensor]) -> Tensor:
        neg_max, neg_logsum, pos_max, pos_logsum = table[: PairStat.POS_SUM].unbind()
        some = table[PairStat.POS_COUNT] > 0
        x = (neg_max - pos_max) + (neg_logsum - pos_logsum)
        ctx.compose = compose
        ctx.save_for_backward(table, torch.where(some, torch.sigmoid(x), 0.0))
        return torch.where(some, F.softplus(x, threshold=40), 0.0)  # beyond 40 it is x in float64 too

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        table, slope = ctx.saved_tensors
        if torch.is_grad_enabled() or batched(grad):
            return _differentiate(lambda t: (ctx.compose(t),), (table,), (grad,))[0], None
        out = torch.zeros_like(table)
        torch.mul(grad, slope, out=out[PairStat.NEG_LOGSUM])
        torch.neg(out[PairStat.NEG_LOGSUM], out=out[PairStat.POS_LOGSUM])
        return out, None


def nll(table: Tensor, compose: Callable[[Tensor], Tensor]) -> Tensor:
    """The nll of each row of a table [.., 9 or 7, M]; `compose` is the same of PyTorch's operations."""
    if table.dim() != 2 or functorch_active() or torch.compiler.is_compiling() or forward_mode_active():
        return compose(table)
    return _Nll.apply(table, compose)
