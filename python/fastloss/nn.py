"""Drop-in loss modules: every loss of torch.nn under its own name and constructor.

`CrossEntropyLoss`, `LinearCrossEntropyLoss`, `BCEWithLogitsLoss` and `KLDivLoss` run on fastloss kernels; the other names
are torch's own classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import (
    AdaptiveLogSoftmaxWithLoss,
    BCELoss,
    CosineEmbeddingLoss,
    CTCLoss,
    GaussianNLLLoss,
    HingeEmbeddingLoss,
    HuberLoss,
    L1Loss,
    MarginRankingLoss,
    MSELoss,
    MultiLabelMarginLoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    NLLLoss,
    NLLLoss2d,
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
    TripletMarginLoss,
    TripletMarginWithDistanceLoss,
)

from . import functional
from .distillation_modules import DualHeadDistillationLoss
from .policy_modules import (
    AsymRELoss,
    CISPOLoss,
    DPOLoss,
    GRPOLoss,
    GSPOLoss,
    IPOLoss,
    KTOLoss,
    LinearPolicyLoss,
    OPMDLoss,
    ORPOLoss,
    PolicyGradientLoss,
    PolicyLoss,
    PPOLoss,
    PreferenceLoss,
    RECLoss,
    RPOLoss,
    SAPOLoss,
    SimPOLoss,
    TOPRLoss,
)
from .region_modules import AnyLoss, DiceLoss, IoULoss, RegionLoss, TverskyLoss
from .row_loss import RowFunction, check_reduction, linear_row_loss, row_loss

if TYPE_CHECKING:
    from .spherical import SphericalLinear

__all__ = [
    "AdaptiveLogSoftmaxWithLoss",
    "AnyLoss",
    "AsymRELoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CISPOLoss",
    "CTCLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "DPOLoss",
    "DiceLoss",
    "DualHeadDistillationLoss",
    "GRPOLoss",
    "GSPOLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "IPOLoss",
    "IoULoss",
    "KLDivLoss",
    "KTOLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "LinearPolicyLoss",
    "LinearRowLoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "NLLLoss2d",
    "OPMDLoss",
    "ORPOLoss",
    "PPOLoss",
    "PoissonNLLLoss",
    "PolicyGradientLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "RECLoss",
    "RPOLoss",
    "RegionLoss",
    "RowLoss",
    "SAPOLoss",
    "SimPOLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "SphericalLinear",
    "TOPRLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
    "TverskyLoss",
]


@dataclasses.dataclass(frozen=True)
class _LinearCrossEntropyOptions:
    """torch 2.13's options, on older torch. fastloss reads batch_chunk_size; the rest is accepted and has no meaning here."""

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: torch.dtype | None = None


LinearCrossEntropyOptions: type = getattr(torch.nn, "LinearCrossEntropyOptions", _LinearCrossEntropyOptions)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastloss kernels; see `fastloss.functional.cross_entropy`.

    Keyword-only beyond torch: z_loss, softcap, logit_scale, shift.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        shift: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale, self.shift = z_loss, softcap, logit_scale, shift

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, d_1..d_K) or (C)."""
        return functional.cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            logit_scale=self.logit_scale, shift=self.shift,
        )  # fmt: skip


class LinearCrossEntropyLoss(torch.nn.Module):
    """torch 2.13's nn.LinearCrossEntropyLoss on fastloss kernels, on older torch too: a head that owns its loss.

    The logits of `self.linear` are never stored; see `fastloss.functional.linear_cross_entropy`.
    Keyword-only beyond torch: z_loss, softcap, logit_scale, shift, max_extra_bytes.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        shift: bool = False,
        max_extra_bytes: int | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.max_extra_bytes = options, max_extra_bytes
        self.z_loss, self.softcap, self.logit_scale, self.shift = z_loss, softcap, logit_scale, shift
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, *, returns: Iterable[str] = ()) -> Any:
        """The loss of features (N, in_features); any number of leading dims."""
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        weight = None if self.out_features else getattr(self.linear, "compressed_weight", None)
        if weight is None:
            weight = self.linear.weight.reshape(*shape, -1)
        return functional.linear_cross_entropy(
            input, weight, target,
            linear_bias=None if bias is None else bias.reshape(shape), weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            z_loss=self.z_loss, softcap=self.softcap, logit_scale=self.logit_scale, shift=self.shift, returns=returns,
            max_extra_bytes=self.max_extra_bytes,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As torch prints it."""
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


class RowLoss(torch.nn.Module):
    """Any row loss on logits: `fastloss.row_loss(logits, target, loss, reduction=..., **arguments)`.

    >>> criterion = fastloss.nn.RowLoss(fastloss.losses.generalized_cross_entropy, q=0.7)  # doctest: +SKIP
    """

    def __init__(self, loss: RowFunction, *, reduction: str = "mean", **arguments: Any) -> None:
        super().__init__()
        check_reduction(reduction)
        self.loss, self.reduction, self.numbers = loss, reduction, arguments
        self.tensors = torch.nn.Module()  # what is a tensor moves, trains and is saved with the module
        for name, value in list(arguments.items()):
            if isinstance(value, torch.nn.Parameter):
                self.tensors.register_parameter(name, arguments.pop(name))
            elif isinstance(value, Tensor):
                self.tensors.register_buffer(name, arguments.pop(name))

    @property
    def arguments(self) -> dict[str, Any]:
        """What the loss and its statistics are given at every call."""
        return {**self.numbers, **dict(self.tensors.named_parameters()), **dict(self.tensors.named_buffers())}

    def forward(self, logits: Tensor, target: Tensor | None = None, **arguments: Any) -> Tensor:
        """The loss of logits [..., V]; `arguments` of this call (a teacher, advantages) come on top of the module's."""
        return row_loss(logits, target, self.loss, reduction=self.reduction, **{**self.arguments, **arguments})

    def extra_repr(self) -> str:
        """The loss, its reduction and its arguments."""
        given = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f"{getattr(self.loss, '__name__', self.loss)}, reduction={self.reduction!r}{given}"


class LinearRowLoss(RowLoss):
    """Any row loss on a linear head whose logits are never stored: `fastloss.linear_row_loss`."""

    def forward(  # type: ignore[override]
        self, input: Tensor, linear_weight: Tensor, target: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """The loss of features [..., D] under the head's weight [V, D]."""
        arguments = {**self.arguments, **arguments}
        return linear_row_loss(input, linear_weight, target, self.loss, reduction=self.reduction, **arguments)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss on fastloss kernels; see `fastloss.functional.binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and targets of the same shape."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """torch.nn.KLDivLoss on fastloss kernels; see `fastloss.functional.kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The divergence of log-probabilities `input` from `target`."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


def __getattr__(name: str) -> Any:
    """Whatever else torch.nn has, so that swapping the import is always safe."""
    if name == "SphericalLinear":  # on first use: it imports torch._dynamo, to be left alone by torch.compile
        from .spherical import SphericalLinear

        return SphericalLinear
    return getattr(torch.nn, name)
