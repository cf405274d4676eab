"""Losses of test-time adaptation and of hyperbolic geometry, on a few classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import row_stats
from . import catalogue


@catalogue.entry(
    formula="(1/C) sum_{j != k} R_jk, R = rows of P^T P divided by their sums, P = softmax(z)",
    gradient="by autograd of a C x C matrix",
    source="Test-time Batch Statistics Calibration for Covariate Shift",
)
def class_correlation(logits: Tensor) -> Tensor:
    """Core, the class-correlation loss of alpha-BN: how much the predictions [B, C] of a batch confuse pairs of classes.

    0 when every prediction is certain. Classes that no prediction gives any mass count nothing.

    One number, in float32 at least. Raises ValueError for other shapes.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, C], got {tuple(logits.shape)}")
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(p.device.type, enabled=False):
        together = p.T @ p
    total = together.sum(-1)
    some = total > 0
    rows = together / torch.where(some, total, 1.0)[:, None]
    return (rows.sum() - rows.diagonal().sum()) / logits.shape[1]


def _norm(x: Tensor) -> Tensor:
    """||x|| over the last dim, its gradient 0 (not NaN) at 0."""
    square = (x * x).sum(-1, keepdim=True)
    some = square > 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def _check_curvature(c: float) -> None:
    if not c > 0:
        raise ValueError(f"c, minus the curvature of the ball, must be > 0, got {c}")


def exponential_map(x: Tensor, *, c: float = 0.1, clip: float | None = 2.0) -> Tensor:
    """Features [..., D] -> points of the Poincare ball of curvature -c, from its origin; features clipped to norm `clip`."""
    _check_curvature(c)
    norm = _norm(x)
    if clip is not None:
        x = x * (clip / norm.clamp(min=clip))
        norm = norm.clamp(max=clip)
    scaled = c**0.5 * norm
    some = scaled > 0
    return x * torch.where(some, torch.tanh(scaled) / torch.where(some, scaled, 1.0), 1.0)


def mobius_add(x: Tensor, y: Tensor, *, c: float = 0.1) -> Tensor:
    """x (+) y in the Poincare ball of curvature -c."""
    xy, xx, yy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
    top = (1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y
    return top / (1 + 2 * c * xy + c * c * xx * yy)


def poincare_distance(x: Tensor, y: Tensor, *, c: float = 0.1) -> Tensor:
    """(2 / sqrt(c)) artanh(sqrt(c) ||(-x) (+) y||), over the last dim. In float32 at least.

    Written as (2 / sqrt(c)) arsinh(sqrt(c) ||x - y|| / sqrt((1 - c ||x||^2) (1 - c ||y||^2))), which is the same: the
    argument of artanh rounds to 1 for points that are far apart.
    """
    _check_curvature(c)
    x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    room = ((1 - c * (x * x).sum(-1)) * (1 - c * (y * y).sum(-1))).clamp(min=torch.finfo(x.dtype).tiny)
    return 2 / c**0.5 * torch.asinh(c**0.5 * _norm(x - y)[..., 0] / room.sqrt())


@catalogue.entry(
    formula="mean over pairs of (2 / sqrt(c)) artanh(sqrt(c) ||(-x) (+) y||)",
    gradient="by autograd of the distance",
    source="Hyp-OC: Hyperbolic One Class Classification for Face Anti-Spoofing",
    published="Hyp-PC takes atan where the geometry has artanh",
)
def pairwise_confusion(points: Tensor, *, c: float = 0.1) -> Tensor:
    """Hyp-PC: the mean distance between the first and the second half of points [2 B, D] of the Poincare ball.

    Raises ValueError for another shape and c <= 0.
    """
    if points.dim() != 2 or len(points) % 2 or not len(points):
        raise ValueError(f"takes an even number of points [2 B, D], got {tuple(points.shape)}")
    first, second = points.chunk(2)
    return poincare_distance(first, second, c=c).mean()


def hyperbolic_logits(points: Tensor, planes: Tensor, normals: Tensor, *, c: float = 0.1) -> Tensor:
    """Scores [B, C] of a multinomial regression in the ball: points [B, D], planes [C, D] (points), normals [C, D].

    (lambda_k ||a_k|| / sqrt(c)) arsinh(2 sqrt(c) <(-p_k) (+) x, a_k> / ((1 - c ||(-p_k) (+) x||^2) ||a_k||)).
    """
    moved = mobius_add(-planes[None], points[:, None], c=c)
    size = _norm(normals)[:, 0].clamp(min=1e-12)
    conformal = 2 / (1 - c * (planes * planes).sum(-1))
    inside = (1 - c * (moved * moved).sum(-1)).clamp(min=1e-7)
    projected = (moved * normals).sum(-1)  # no matrix product: autocast would round it to 16 bits
    return conformal * size / c**0.5 * torch.asinh(2 * c**0.5 * projected / (inside * size))


@catalogue.entry(
    formula="-log softmax(hyperbolic logits)_y",
    gradient="cross entropy's, through the logits",
    source="Hyp-OC: Hyperbolic One Class Classification for Face Anti-Spoofing",
)
def hyperbolic_cross_entropy(
    features: Tensor, target: Tensor, planes: Tensor, normals: Tensor, *, c: float = 0.1, clip: float | None = 2.0
) -> Tensor:
    """Hyp-CE of Euclidean features [B, D], one value a row: clipped, mapped into the ball, classified there."""
    points = exponential_map(features, c=c, clip=clip)
    return -row_stats(hyperbolic_logits(points, planes, normals, c=c), target).logp


@catalogue.entry(
    formula="-2 log2(1'KL1 / N^3) + log2(tr(KL) / N^2) + log2(sum K sum L / N^4)",
    gradient="by autograd of two N x N matrices",
    source="Cauchy-Schwarz Divergence Information Bottleneck for Regression",
)
def cauchy_schwarz_dependence(
    x: Tensor, y: Tensor, *, sigma_x: float | None = None, sigma_y: float | None = None
) -> Tensor:
    """The Cauchy-Schwarz quadratic mutual information of samples x [N, D] and y [N, E] under Gaussian kernels.

    sigma: the kernel's width squared, e^(-d^2 / sigma); None: 10 times the median of the squared distances, detached.

    One number, in float32 at least. Raises ValueError for other shapes and N < 2.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"takes x [N, D] and y [N, E] with N >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        k, m = (_gram(t.to(torch.promote_types(t.dtype, torch.float32)), s) for t, s in ((x, sigma_x), (y, sigma_y)))
    cross = (k.sum(1) * m.sum(1)).sum() / n**3
    joint, apart = (k * m).sum() / n**2, k.sum() * m.sum() / n**4
    return -2 * cross.log2() + joint.log2() + apart.log2()


def _gram(x: Tensor, sigma: float | None) -> Tensor:
    x = x - x.mean(0)
    size = (x * x).sum(-1)
    square = (size[:, None] + size[None] - 2 * x @ x.T).clamp(min=0)
    width = 10 * square.detach().median().clamp(min=1e-12) if sigma is None else sigma
    return (-square / width).exp()
