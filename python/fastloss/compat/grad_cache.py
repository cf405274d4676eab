"""GradCache's `SimpleContrastiveLoss` and `DistributedContrastiveLoss`, the `loss_fn` of its `GradCache`, without the
logits.

GradCache takes embeddings as they are and has no temperature: scale them in the model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..contrastive.distributed import gather_keys, mean_over_ranks, place, scale_gradient
from ..contrastive.reduction import reduce
from ..pairs import SameId, pair_stats

_REDUCTIONS = ("mean", "sum", "none")


class SimpleContrastiveLoss:
    """The cross entropy of <x_i, y_j> over j, with the target column i (n_hard_negatives + 1): y holds each row's
    positive and then its hard negatives."""

    def __init__(self, n_hard_negatives: int = 0) -> None:
        self.n_hn = n_hard_negatives

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss of x [M, D] and y [N, D].

        target: the positive's column of each row, integers [M] in [0, N). reduction: "mean", "sum" or "none".
        Raises ValueError for targets that do not fit, IndexError, on a CPU, for those that are no columns.
        """
        return self._loss(x, y, target, reduction, 0)

    def _loss(self, x: Tensor, y: Tensor, target: Tensor | None, reduction: str, first_row: int) -> Tensor:
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        if target is None:
            step = self.n_hn + 1
            target = torch.arange(first_row, first_row + len(x), device=x.device) * step
            if (first_row + len(x) - 1) * step >= len(y):
                raise ValueError(
                    f"{len(x)} rows with {self.n_hn} hard negatives each need {len(x) * step} keys, got {len(y)}"
                )
        elif target.shape != (len(x),):
            raise ValueError(f"target must have shape [{len(x)}], got {list(target.shape)}")
        elif target.device.type == "cpu" and bool(((target < 0) | (target >= len(y))).any()):
            raise IndexError(f"target must be in [0, {len(y)}), got {int(target.min())} to {int(target.max())}")
        columns = torch.arange(len(y), device=y.device)
        return reduce(pair_stats(x, y, positive=SameId(target, columns), columns=False).nll, reduction)


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """`SimpleContrastiveLoss` of the embeddings of all ranks: each returns the mean over all rows.

    As in GradCache, the gradient of a rank's embeddings is that of the mean over all rows, so multiply the loss by the
    world size under DistributedDataParallel. GradCache computes all W b rows on every rank; here a rank computes its
    own b. Raises RuntimeError without a process group; TypeError for anything but reduction="mean" without targets.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("DistributedContrastiveLoss needs torch.distributed.init_process_group")
        super().__init__(n_hard_negatives)
        self.rank, self.word_size = place()

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The mean loss of x [b, D] and y [b (n_hard_negatives + 1), D] of all ranks."""
        if target is not None or reduction != "mean":
            raise TypeError("DistributedContrastiveLoss takes reduction='mean' and no target")
        x, y = scale_gradient(x, 1 / self.word_size), scale_gradient(y, 1 / self.word_size)
        return mean_over_ranks(self._loss(x, gather_keys(y), None, reduction, self.rank * len(x)))
