"""Wasserstein predictive coding: InfoNCE with a critic whose slope is kept at 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import pair_stats
from .arguments import check_same_shape, check_weight, row_dots

Encoder = Callable[[Tensor], Tensor]


def gradient_penalty(critic: Callable[..., Tensor], *points: Tensor) -> Tensor:
    """mean_i (|grad f(point_i)|_2 - 1)^2, the gradient being over all of example i's inputs together; differentiable.

    critic: f(*points) -> [B]. points: [B, ...] each; their own gradients are not asked for.
    """
    leaves = [p.detach().requires_grad_() for p in points]
    with torch.enable_grad():
        value = critic(*leaves)
        if value.dim() != 1 or value.shape[0] != points[0].shape[0]:
            raise ValueError(f"the critic must return [{points[0].shape[0]}], got {list(value.shape)}")
        slopes = torch.autograd.grad(value.sum(), leaves, create_graph=True)
    norm = torch.linalg.vector_norm(torch.cat([s.flatten(1) for s in slopes], 1), dim=1)
    return (norm - 1).square().mean()


def _between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *[1] * (a.dim() - 1)).to(a.dtype)
    return share * a + (1 - share) * b


@catalogue.entry(
    formula="mean_i -log softmax_j f(x_i, y_j)_i + lambda mean_i (|grad f(x^_i, y^_i)|_2 - 1)^2, f(x, y) = <g(x), "
    "h(y)>, (x^, y^) between pairs that belong together and pairs that do not",
    gradient="of InfoNCE, and by double backward through g and h of the penalty",
    source="Wasserstein Dependency Measure for Representation Learning",
    published="lambda is not known to us: it has no default",
)
def wpc_loss(
    encode_x: Encoder, encode_y: Encoder, x: Tensor, y: Tensor, *, penalty_weight: float,
    share: Tensor | None = None, permutation: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE of the separable critic f(x, y) = <g(x), h(y)>, and a penalty that keeps it 1-Lipschitz.

    Args:
        encode_x, encode_y: g and h, from [B, ...] to [B, D]; twice differentiable.
        x, y: inputs [B, ...]; row i of both belongs together.
        penalty_weight: lambda. share: where between, [B] in [0, 1], uniform if None. permutation: int64 [B], which y stands for
            one that does not belong; random if None.
        reduction: "mean" or "sum" of InfoNCE's rows; the penalty is a mean always.

    The gradient of the loss may be differentiated again (create_graph): the pairs then come from the reference.
    Raises ValueError and TypeError as `pair_stats`. Memory: O(B D). Source: Wasserstein Dependency Measure for Representation
    Learning.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    check_weight("penalty_weight", penalty_weight)
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(f"x and y must have one batch, got {list(x.shape)} and {list(y.shape)}")
    batch = x.shape[0]
    q, k = encode_x(x), encode_y(y)
    check_same_shape(q, k)
    nll = pair_stats(q, k, columns=False).nll
    share = torch.rand(batch, device=x.device) if share is None else share
    permutation = torch.randperm(batch, device=x.device) if permutation is None else permutation
    if share.shape != (batch,) or permutation.shape != (batch,):
        raise ValueError(
            f"share and permutation must be [{batch}], got {list(share.shape)} and {list(permutation.shape)}"
        )
    points = (x, _between(y, y[permutation], share))
    penalty = gradient_penalty(lambda a, b: row_dots(encode_x(a), encode_y(b)), *points)
    return (nll.mean() if reduction == "mean" else nll.sum()) + penalty_weight * penalty
