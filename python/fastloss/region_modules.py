"""Region losses as modules: each is `fastloss.region_loss` with its arguments kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .losses import region
from .regions import check_arguments, region_loss
from .row_loss import check_reduction


class RegionLoss(torch.nn.Module):
    """Any region loss: `fastloss.region_loss(logits, target, loss, reduction=..., **arguments)`.

    `arguments` are those of the loss and those of `fastloss.region_stats`: per, ignore_index, sharpness, activation, ...

    >>> criterion = fastloss.nn.RegionLoss(fastloss.losses.f_beta, beta=2.0, sharpness=10.0)  # doctest: +SKIP
    """

    def __init__(self, loss: Callable[..., Tensor], *, reduction: str = "mean", **arguments: Any) -> None:
        super().__init__()
        check_reduction(reduction)
        check_arguments(loss, arguments)
        self.loss, self.reduction, self.arguments = loss, reduction, arguments

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits [B, C, *spatial] under a target of `fastloss.region_stats`; 0 in `mask` does not count."""
        return region_loss(logits, target, self.loss, reduction=self.reduction, mask=mask, **self.arguments)

    def extra_repr(self) -> str:
        """The loss, its reduction and its arguments."""
        given = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        name = getattr(self.loss, "__name__", self.loss) if type(self) is RegionLoss else ""
        return f"{name}, reduction={self.reduction!r}{given}".removeprefix(", ")


class DiceLoss(RegionLoss):
    """Dice loss of each region: `fastloss.losses.dice` (form, smooth)."""

    def __init__(
        self, form: str = "linear", smooth: float | None = None, *, reduction: str = "mean", **arguments: Any
    ) -> None:
        super().__init__(region.dice, reduction=reduction, form=form, smooth=smooth, **arguments)


class IoULoss(RegionLoss):
    """One minus the soft intersection over union of each region: `fastloss.losses.iou` (eps)."""

    def __init__(self, eps: float = 1e-6, *, reduction: str = "mean", **arguments: Any) -> None:
        super().__init__(region.iou, reduction=reduction, eps=eps, **arguments)


class TverskyLoss(RegionLoss):
    """Tversky loss of each region, to the power gamma: `fastloss.losses.tversky`, and `focal_tversky` for gamma != 1."""

    def __init__(
        self, alpha: float = 0.3, beta: float = 0.7, gamma: float = 1.0, smooth: float = 1.0, *,
        reduction: str = "mean", **arguments: Any,
    ) -> None:  # fmt: skip
        power = {} if gamma == 1 else {"gamma": gamma}
        loss = region.focal_tversky if power else region.tversky
        super().__init__(loss, reduction=reduction, alpha=alpha, beta=beta, smooth=smooth, **power, **arguments)


_METRICS: dict[str, Callable[..., Tensor]] = {
    "f_beta": region.f_beta,
    "g_mean": region.g_mean,
    "balanced_accuracy": region.balanced_accuracy,
}


class AnyLoss(RegionLoss):
    """One minus a metric of sharpened predictions: "f_beta" (with beta), "g_mean" or "balanced_accuracy".

    sharpness is the paper's L, 2 to 70; one value for all samples by default, as a metric of a batch.
    """

    def __init__(
        self, metric: str = "f_beta", sharpness: float = 10.0, *, per: str = "batch", reduction: str = "mean",
        **arguments: Any,
    ) -> None:  # fmt: skip
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric!r}")
        super().__init__(_METRICS[metric], reduction=reduction, sharpness=sharpness, per=per, **arguments)
