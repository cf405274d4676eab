"""What tests/test_gpu_pairs.py checks on a GPU, for operands of any device: tests/triton runs it in the interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

import fastloss
from fastloss.contract import PairFunction
from fastloss.pairs.pairing import Pairing
from triton_pair_problem import (
    EVERYTHING,
    TOLERANCE,
    close,
    close_gradients,
    double,
    gradient_truth,
    map_truth,
    statistics_truth,
)

OPS = torch.ops.fastloss


def on(p: Pairing, device: str = "cuda") -> Pairing:
    """The same pairing on the device."""
    return Pairing(*(x.to(device) if isinstance(x, Tensor) else x for x in p))


def check_stats(
    p: Pairing, want: int = EVERYTHING, boost: Tensor | None = None, margin: Tensor | None = None,
    forward: str = "triton", backward: str = "triton",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Statistics, and the gradients of a random loss of them, against float64; returns what the kernels gave."""
    args = boost, margin, want, 2.0
    largest = float((p.row_scale[:, None] * p.q.float().norm(dim=1, keepdim=True)).nan_to_num(0).abs().max())
    with fastloss.use_backend(forward):
        rows, columns, kept = OPS.pair_stats(*p, *args, 0)
    for name, ours, truth in zip(("rows", "columns"), (rows, columns), statistics_truth(p, *args), strict=True):
        close(ours, truth, 5e-6 * (1 + largest), name)
    grads = (torch.randn(9, p.shape[0], device=p.device), torch.randn(7, columns.shape[1], device=p.device))
    with fastloss.use_backend(backward):
        ours = OPS.pair_stats_backward(*grads, rows, columns, kept, *p, *args, 0, 15)
    close_gradients(ours, gradient_truth(grads, p, *args), p.q.dtype)
    return rows, columns, *ours


def check_map(p: Pairing, function: PairFunction) -> tuple[Tensor, ...]:
    """Sums of phi with thresholds, and gradients of a random loss of them."""
    thresholds = tuple(torch.randn(p.shape[0], device=p.device) for _ in range(2))
    grad = torch.randn(8, p.shape[0], device=p.device)
    table, gradients = map_truth(p, thresholds, function, grad)
    with fastloss.use_backend("triton"):
        ours = OPS.pair_map(*p, *thresholds, int(function))
        made = OPS.pair_map_backward(grad, *p, *thresholds, int(function), 15)
    close(ours, table, 1e-5)
    close_gradients(made, gradients, p.q.dtype)
    return ours, *made


def whole(p: Pairing) -> Pairing:
    """Small integers, whose sums are exact, so that ranks are those of float64; there are many ties."""
    q, k = ((x.float() * 20).round().to(x.dtype) for x in (p.q, p.k))
    return p._replace(q=q, k=k, row_scale=torch.ones_like(p.row_scale), column_scale=None)


def check_topk(p: Pairing, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """The very columns and values of float64."""
    p = whole(p)
    with fastloss.use_backend("triton"):
        values, columns = OPS.row_topk(*p, count, classes)
    with fastloss.use_backend("reference"):
        truth, where = OPS.row_topk(*map(double, p), count, classes)
    assert torch.equal(columns, where) and torch.equal(values.double(), truth)
    return values, columns


def check_edges(
    backend: str, m: int, n: int, d: int, edges: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """Dots along random edges and the sums that are their gradients; an id out of range gives NaN and reads nothing."""
    q, k = (torch.randn(rows, d, device=device).to(dtype) for rows in (m, n))
    rows, columns = (torch.randint(0, size, (edges,), device=device) for size in (m, n))
    rows = rows.sort().values
    pointer = torch.searchsorted(rows, torch.arange(m + 1, device=device))
    weight = torch.randn(edges, device=device)
    with fastloss.use_backend("reference"):
        dots = OPS.edge_dot(q.double(), k.double(), rows, columns)
        sums = OPS.edge_sum(k.double(), weight.double(), pointer, columns)
    outside = columns.clone()
    outside[::3] = n
    outside[1::3] = -1
    with fastloss.use_backend(backend):
        ours = OPS.edge_dot(q, k, rows, columns), OPS.edge_sum(k, weight, pointer, columns)
        nowhere = OPS.edge_dot(q, k, rows, outside)
    scale = d**0.5
    torch.testing.assert_close(ours[0].double(), dots, rtol=1e-5, atol=1e-5 * scale)
    assert ours[1].dtype == dtype and (ours[1] - sums).norm() <= TOLERANCE[dtype] * sums.norm()
    assert torch.equal(nowhere.isnan(), (outside < 0) | (outside >= n))
    return ours


def clip_rows(q: Tensor, k: Tensor, scale: float, at: Tensor) -> tuple[Tensor, Tensor]:
    """(nll of the rows `at`, their gradient of clip_loss) in float64; the columns' sums in blocks."""
    b, columns = len(q), []
    for part in k.split(2048):
        columns.append((scale * (q.float() @ part.float().T)).logsumexp(0))
    z = scale * (q[at].double() @ k.double().T)
    slope = z.softmax(1) + (z - torch.cat(columns).double()).exp()
    slope[torch.arange(len(at), device=at.device), at] -= 2
    return z.logsumexp(1) - z.gather(1, at[:, None])[:, 0], scale * (slope @ k.double()) / (2 * b)


def check_large(q: Tensor, k: Tensor, at: Tensor) -> None:
    """Rows of the statistics and of the gradient of a batch of which no dense float64 is made."""
    q, k = q.requires_grad_(), k.requires_grad_()
    nll, dq = clip_rows(q.detach(), k.detach(), 20.0, at)
    torch.testing.assert_close(fastloss.pair_stats(q, k, scale=20.0).nll[at].double(), nll, rtol=1e-4, atol=1e-4)
    (ours,) = torch.autograd.grad(fastloss.contrastive.clip_loss(q, k, 20.0), q)
    assert (ours[at].double() - dq).norm() <= TOLERANCE[q.dtype] * dq.norm()
