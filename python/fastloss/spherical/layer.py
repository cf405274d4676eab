"""`SphericalLinear`: an output layer that is its own optimizer, with a step that costs the same for any number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.spherical import z_normalized_loss
from ..row_loss import reduce_rows
from . import prediction
from .arguments import check_input, check_rates, check_size
from .autograd import Statistics
from .factors import Drift, Gradient
from .gather import broadcast, gather
from .state import FactoredState
from .statistics import SphericalStats

#: A step after which U is worse conditioned than this (1 is best) is followed by `stabilize` at once.
CONDITION = 8.0
#: A step that would leave U worse conditioned than this is done on V U instead: an update of W is rounded in V at
#: eps * condition * sqrt(in_features) of its size.
WORST_CONDITION = {torch.float32: 30.0, torch.float64: 1e5}


class SphericalLinear(FactoredState):
    r"""A linear layer without bias and its loss, for very many classes: exact SGD at a cost that does not depend on them.

    The scores of an example h are o = W h, W [num_classes, in_features]. A loss that needs only the scores of the
    listed classes, :math:`\sum_k o_k` and :math:`\sum_k o_k^2` (the spherical family: `fastloss.losses.z_normalized_loss`,
    `one_hot_mse`, `log_taylor_softmax`, `log_spherical_softmax`) is computed, differentiated and followed by the exact
    step of plain SGD on W in O(in_features^2) an example, since W = V U + 1 omegaᵀ is kept in factors:

    >>> head = fastloss.nn.SphericalLinear(256, 800_000, lr=0.1)  # doctest: +SKIP
    >>> loss = head(features, class_ids)                          # doctest: +SKIP
    >>> loss.backward()  # gradients of what made the features; W's own gradient is kept as a low-rank form
    >>> optimizer.step()                                          # doctest: +SKIP
    >>> head.step()      # W <- W - lr dL/dW                      # doctest: +SKIP

    The layer is the optimizer of its weight: it has no parameters, only buffers, so no torch optimizer, clipping or
    gradient hook sees W. Only plain SGD (lr may change at each step) with weight decay is possible. Every backward pass
    in training mode must be followed by one `step` (or `discard`); what would apply a wrong update, apply it twice or
    not at all raises RuntimeError. In eval mode, or without grad, nothing is kept for a step.

    in_features, num_classes: d and D. lr: the learning rate, an attribute that may be set at any time.
    weight_decay: W <- (1 - lr weight_decay) W - lr dL/dW, as torch.optim.SGD.
    bias_input: append this constant to every input, so that bias_input W[:, -1] is a bias; its learning rate is
    bias_input^2 times that of the weights (the paper's experiments use 0.001). None: no bias.
    ignore_index: a class id that counts nothing. accumulate: backward passes that make one step, whose losses are summed.
    stabilize_period: every so many steps the inverse of U is made anew and singular values of U that have left
    [1/2, 2] of their median are corrected (D d each; more than a third of them: D d^2).
    process_group: data parallel; every rank applies the mean of all ranks' gradients. Rank 0's initial V is sent to all.
    std: standard deviation of the initial W. dtype: of V, float32 (default) or float64; all else is float64.

    The buffers: `v` [D, d], `u`, `inverse`, `gram` [d, d], `omega`, `total` [d] (see `Factors`), written by the layer only.
    A wrapper that writes into buffers (DistributedDataParallel with broadcast_buffers=True) is noticed and refused.
    Conversions of dtype (`half()`, `to(torch.bfloat16)`) leave the layer as it is: it needs float64.
    `state_dict` resumes bit-equal. Under torch.compile the layer is a graph break; torch.func cannot differentiate it.

    Source: Vincent, de Brebisson and Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very
    Large Sparse Targets" (2015).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        lr: float,
        weight_decay: float = 0.0,
        bias_input: float | None = None,
        ignore_index: int = -100,
        accumulate: int = 1,
        stabilize_period: int = 100,
        process_group: Any = None,
        std: float = 1e-3,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size(in_features, num_classes, accumulate, stabilize_period, bias_input, std)
        check_rates(lr, weight_decay)
        super().__init__(num_classes, in_features + (bias_input is not None), device, dtype or torch.float32)
        self.in_features, self.num_classes, self.bias_input = in_features, num_classes, bias_input
        self.lr, self.weight_decay = lr, weight_decay
        self.ignore_index, self.accumulate = ignore_index, accumulate
        self.stabilize_period, self.process_group = stabilize_period, process_group
        with torch.no_grad(), self.change():
            self._restart(self.v.normal_(0, std))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Start from this W [num_classes, in_features] (one more column with a bias_input). Costs D d^2."""
        if weight.shape != self.v.shape or not weight.is_floating_point():
            raise ValueError(
                f"weight must be floating, of shape {tuple(self.v.shape)}, got {weight.dtype} {tuple(weight.shape)}"
            )
        if not weight.isfinite().all():
            raise ValueError("weight must be finite: one NaN would reach every class through the Gram matrix")
        with self.change():
            self._restart(self.v.copy_(weight))

    def _restart(self, v: Tensor) -> None:
        """The state that belongs to W = V."""
        if self.process_group is not None:
            broadcast(v, self.process_group)
        self.u.copy_(torch.eye(self.u.shape[0]))
        self.omega.zero_()
        self.factors.refresh()
        self.steps = 0

    # Training

    @torch.compiler.disable
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        loss: Callable[..., Tensor] = z_normalized_loss,
        *,
        reduction: str = "mean",
        **loss_arguments: Any,
    ) -> Tensor:
        """loss(row_stats(input, target), **loss_arguments), reduced over the listed classes that count.

        In float32, or float64 for float64 input.
        """
        stats = self.row_stats(input, target)
        value = reduce_rows(loss(stats, **loss_arguments), stats, reduction)  # type: ignore[arg-type]
        return value.to(torch.promote_types(input.dtype, torch.float32))

    @torch.compiler.disable
    def row_stats(self, input: Tensor, target: Tensor) -> SphericalStats:
        """Differentiable statistics of the scores of each row of input, for any loss of these.

        input: [..., in_features], any floating dtype. target: class ids [...] or, K listed classes a row, [..., K]; a
        class may be listed more than once.

        Raises ValueError for shapes and devices, TypeError for dtypes, IndexError for a class id out of range, and
        RuntimeError in training mode while earlier backward passes wait for their `step`.
        """
        training = self.training and torch.is_grad_enabled()
        self.check_untouched()
        if training and len(self.pending) >= self.accumulate:
            raise RuntimeError(
                f"{len(self.pending)} backward passes wait to be applied (accumulate={self.accumulate}): call step() or "
                "discard() before the next forward in training mode, or eval() if no training is meant"
            )
        listed = check_input(self, input, target)
        flat = target.reshape(-1, target.shape[-1] if listed else 1).to(torch.int64)
        # a leaf of its own: so that there is a backward pass also where the input needs no gradient
        leaf = torch.zeros((), device=input.device, requires_grad=True) if training else None
        outputs = Statistics.apply(input.reshape(-1, self.in_features), leaf, flat, self)
        rows = (*input.shape[:-1], 1) if listed else input.shape[:-1]
        scores, total, centred = outputs
        return SphericalStats(
            scores.reshape(target.shape), total.reshape(rows), centred.reshape(rows), self.num_classes, target,
            self.ignore_index,
        )  # fmt: skip

    def extended(self, input: Tensor) -> Tensor:
        """Rows of input in float64, with the column of the bias."""
        x = input.to(self.u.dtype)
        return x if self.bias_input is None else torch.nn.functional.pad(x, (0, 1), value=self.bias_input)

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, *, lr: float | None = None, gradient_scale: float = 1.0) -> None:
        """W <- (1 - lr weight_decay) W - lr gradient_scale dL/dW, for the backward passes since the last step.

        lr: for this step; default the attribute. gradient_scale: 1 / the scale of a GradScaler, say.
        Raises RuntimeError, and changes nothing, where there is nothing to apply or a gradient is not finite.
        """
        rate = self.lr if lr is None else lr
        check_rates(rate, self.weight_decay)
        if not math.isfinite(gradient_scale):
            raise ValueError(f"gradient_scale must be a finite number, got {gradient_scale}")
        self.check_untouched()
        if not self.pending:
            raise RuntimeError("step() without a backward pass in training mode since the last step: nothing to apply")
        gradient = Gradient.concatenate(self.pending)
        if self.process_group is not None:
            gradient, ranks = gather(gradient, (rate, self.weight_decay, gradient_scale), self.process_group)
            gradient_scale /= ranks
        if gradient_scale != 1:
            gradient = gradient.scaled(gradient_scale)
        if not gradient.finite():
            raise RuntimeError("the gradient of this step is not finite; nothing was changed. discard() drops it")
        self.pending.clear()
        with self.change():
            condition = self.factors.step(gradient, rate, self.weight_decay, WORST_CONDITION[self.v.dtype])
            self.steps += 1
            if condition > CONDITION or self.steps % self.stabilize_period == 0:
                self.factors.stabilize()

    def discard(self) -> None:
        """Drop the backward passes since the last step, as zero_grad does elsewhere."""
        self.pending.clear()

    # What is kept besides

    @torch.no_grad()
    def stabilize(self) -> None:
        """What every stabilize_period steps happens by itself: a new inverse of U, its singular values brought together."""
        self.check_untouched()
        with self.change():
            self.factors.stabilize()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make all that is derived of V, U and omega anew: removes what rounding has added. Costs D d^2."""
        self.check_untouched()
        with self.change():
            self.factors.refresh()

    @torch.no_grad()
    def unfactorize(self) -> None:
        """V <- W, U <- I, omega <- 0: W is as it was. Costs D d^2."""
        self.check_untouched()
        with self.change():
            self.factors.merge(self.u.clone(), self.omega.clone())

    @torch.no_grad()
    def check(self) -> Drift:
        """How far rounding has taken the state from what follows from V, U and omega. Costs D d^2."""
        self.check_untouched()
        return self.factors.drift()

    # Prediction

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """W [num_classes, in_features] (one more column with a bias_input) in the dtype of V. Costs D d^2."""
        self.check_untouched()
        return prediction.materialize(self.factors)

    @torch.no_grad()
    def scores(self, input: Tensor, classes: Tensor) -> Tensor:
        """Scores [..., K] of the classes [K], the same for all rows, or [..., K], of each row. Not differentiable."""
        self.check_untouched()
        check_input(self, input, None)
        if classes.dim() != 1 and classes.shape[:-1] != input.shape[:-1]:
            raise ValueError(f"classes must have shape [K] or {(*input.shape[:-1], 'K')}, got {tuple(classes.shape)}")
        given = classes.expand(*input.shape[:-1], classes.shape[-1])
        check_input(self, input, given)
        found = prediction.scores(self.factors, self.extended(input), given.to(torch.int64))
        return found.to(torch.promote_types(input.dtype, torch.float32))

    @torch.no_grad()
    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores, class ids) [..., k] of the k best classes, best first; the scores of a block of classes at a time.

        Computed in the dtype of V. Costs D d a row. Not differentiable.
        """
        self.check_untouched()
        check_input(self, input, None)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in [1, {self.num_classes}], got {k}")
        values, classes = prediction.topk(self.factors, self.extended(input).reshape(-1, self.u.shape[0]), k)
        shape = (*input.shape[:-1], k)
        return values.to(torch.promote_types(input.dtype, torch.float32)).reshape(shape), classes.reshape(shape)

    def extra_repr(self) -> str:
        """As torch prints it."""
        bias = "" if self.bias_input is None else f", bias_input={self.bias_input}"
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, lr={self.lr}, "
            f"weight_decay={self.weight_decay}{bias}, dtype={self.v.dtype}"
        )
