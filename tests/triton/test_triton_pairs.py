"""pair_stats and its backward of the Triton backend, interpreted, against the float64 reference and formulas of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastloss.triton_kernels import pair_stats as kernels
from fastloss.triton_kernels.linear_row_stats import Tile
from torch import Tensor

import fastloss
from fastloss.pairs.pairing import Pairing
from triton_pair_problem import (
    EVERYTHING,
    close,
    close_gradients,
    features,
    gradient_truth,
    operands,
    statistics_truth,
)

SMALL = Tile(16, 32, 16, 4, 2)
INF = torch.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's log(0)


def check(p: Pairing, want: int = 1, boost: Tensor | None = None, margin: Tensor | None = None, second: float = 2.0,
          needs: int = 15, tile: Tile | None = SMALL, slack: float = 1.0, **options: Any) -> list[Tensor]:  # fmt: skip
    """Statistics, and the gradients of a random loss of them; returns what the kernels gave."""
    args = boost, margin, want, second
    truth = statistics_truth(p, *args)
    z = float((p.row_scale[:, None] * p.q.float().norm(dim=1, keepdim=True)).nan_to_num(0).abs().max())
    rows, columns = kernels.pair_stats(p, *args, tile=tile, splits=3, chunk=2, **options)
    for name, ours, expected in (("rows", rows, truth[0]), ("columns", columns, truth[1])):
        close(ours, expected, 3e-6 * (1 + z) * slack, name)
    grads = torch.randn(9, p.shape[0]), torch.randn(7, columns.shape[1])
    dtype = p.q.dtype
    ours = kernels.pair_stats_backward(*grads, rows, columns, p, *args, needs, tile=tile, chunk=32, **options)
    close_gradients(ours, gradient_truth(grads, p, *args, needs=needs), dtype, slack)
    assert ours[0].dtype == ours[1].dtype == dtype and ours[2].dtype == ours[3].dtype == torch.float32
    return [rows, columns, *ours]


KINDS = [
    "nothing", "diagonal", "two diagonals", "queue", "far diagonals", "ids", "ids and all else", "excluded ids", "bits",
    "excluded bits", "guide",
]  # fmt: skip


@pytest.mark.parametrize("want", [0, EVERYTHING])
@pytest.mark.parametrize("kind", KINDS)
def test_features(kind: str, want: int) -> None:
    m, n = 35, 50
    p = operands(m, n, 20, **features(kind, m, n))
    extra = dict(boost=torch.rand(m) * 2 - 0.5, margin=torch.rand(m)) if want else {}
    check(p, want, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m,n,d", [(1, 1, 1), (2, 3, 16), (63, 65, 7), (70, 64, 48)])
def test_shapes(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    check(operands(m, n, d, dtype, positive_diagonals=(0,)))


@pytest.mark.parametrize("kind,m,n,d", [("diagonal", 300, 70, 48), ("ids", 65, 300, 16), ("queue", 2, 70, 1152)])
def test_default_tiles(kind: str, m: int, n: int, d: int) -> None:
    check(operands(m, n, d, torch.float16, **features(kind, m, n)), tile=None)


@pytest.mark.parametrize("kind", ["two diagonals", "ids"])
def test_bfloat16(kind: str) -> None:
    check(operands(33, 40, 24, torch.bfloat16, **features(kind, 33, 40)), EVERYTHING)


def test_against_log_softmax() -> None:
    """An oracle that shares nothing with the reference: CLIP's loss by torch, differentiated by autograd."""
    p = operands(37, 37, 12, positive_diagonals=(0,))
    leaves = [t.double().requires_grad_() for t in p[:3]]
    z = leaves[2][:, None] * (leaves[0] @ leaves[1].T)
    y = torch.arange(37)
    expected = torch.nn.functional.cross_entropy(z, y) + torch.nn.functional.cross_entropy(z.T, y)
    expected.backward()
    with fastloss.use_backend("triton"):
        rows, columns, _ = torch.ops.fastloss.pair_stats(*p, want=1)
        stats = [t.double().requires_grad_() for t in (rows, columns)]
        loss = sum((torch.logaddexp(t[0] + t[1], t[4]) - t[4]).mean() for t in stats)
        close(loss, expected.detach(), 1e-6)
        grads = [g.float() for g in torch.autograd.grad(loss, stats)]
        ours = torch.ops.fastloss.pair_stats_backward(*grads, rows, columns, torch.empty(0), *p, want=1)
    close_gradients(ours[:3] + (ours[3],), (*(t.grad for t in leaves), torch.empty(0)), torch.float32)


def low(p: Pairing) -> Pairing:
    """All scores below the underflow of fp32's exponential, in tiles that are not full."""
    return p._replace(q=p.q.abs(), k=-p.k.abs() - 0.3, row_scale=p.row_scale * 100)


def spread(p: Pairing) -> Pairing:
    """Log-sum-exps of one tile hundreds of nats apart: both forms with one exponential must fall back."""
    k = p.k.clone()
    k[::3] *= 60
    return p._replace(k=k, row_scale=p.row_scale * torch.linspace(0.1, 8, len(p.row_scale)))


def huge(p: Pairing) -> Pairing:
    """One score towers above all."""
    k = p.k.clone()
    k[5] = 100 * p.q[3]
    return p._replace(k=k)


@pytest.mark.parametrize("kind", ["diagonal", "ids"])
@pytest.mark.parametrize("make", [low, spread, huge])
def test_hard_values(make: Any, kind: str) -> None:
    check(make(operands(40, 70, 16, **features(kind, 40, 70))), EVERYTHING, second=0.5)


def test_no_pair_of_a_class() -> None:
    """-inf and zero gradients, never NaN; whatever is upstream of an empty set does not matter."""
    same = dict(excluded_rows=torch.zeros(20, dtype=torch.int32), excluded_columns=torch.zeros(40, dtype=torch.int32))
    alike = dict(positive_rows=same["excluded_rows"], positive_columns=same["excluded_columns"])
    nobody = dict(row_valid=torch.zeros(20, dtype=torch.uint8))
    for given in (
        alike,
        dict(same, positive_diagonals=(0,)),
        dict(nobody, positive_diagonals=(1,)),
        dict(same, **alike),
    ):
        rows, columns, *_ = check(operands(20, 40, 16, **given), EVERYTHING)
        assert (rows[1] == -INF).all() and (columns[1] == -INF).all() and (rows[5] == 0).all()
    p = operands(20, 40, 16, **same)
    rows, columns = kernels.pair_stats(p, None, None, EVERYTHING, 2.0, tile=SMALL)
    unread = torch.full((9, 20), INF), torch.full((7, 40), torch.nan)
    unread[0][4] = unread[1][4] = 0.0
    grads = kernels.pair_stats_backward(*unread, rows, columns, p, None, None, EVERYTHING, 2.0, 7, tile=SMALL)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("kind", ["diagonal", "ids"])
def test_what_is_not_valid_may_hold_anything(kind: str) -> None:
    """A half-full queue: rows and scales that are not valid are NaN, and change nothing."""
    p = operands(35, 50, 20, **features(kind, 35, 50), column_scale=torch.rand(50) + 0.5)
    row_valid, column_valid = torch.ones(35, dtype=torch.uint8), torch.ones(50, dtype=torch.uint8)
    row_valid[3], column_valid[17:] = 0, 0
    garbage = [t.clone() for t in p[:4]]
    for t, bad in zip(garbage, (3, slice(17, None), 3, slice(17, None)), strict=True):
        t[bad] = torch.nan
    clean = check(p._replace(row_valid=row_valid, column_valid=column_valid), EVERYTHING)
    dirty = p._replace(row_valid=row_valid, column_valid=column_valid)._replace(
        **dict(zip(Pairing._fields, garbage, strict=False))
    )
    rows, columns = kernels.pair_stats(dirty, None, None, EVERYTHING, 2.0, tile=SMALL, splits=3, chunk=2)
    assert torch.equal(rows, clean[0]) and torch.equal(columns, clean[1])
    grads = torch.randn(9, 35), torch.randn(7, 50)
    ours = kernels.pair_stats_backward(*grads, rows, columns, dirty, None, None, EVERYTHING, 2.0, 15, tile=SMALL)
    assert all(g.isfinite().all() for g in ours)
    assert not ours[0][3].any() and not ours[1][17:].any() and not ours[2][3].any() and not ours[3][17:].any()


def test_nan_is_seen() -> None:
    """As in torch: what a NaN counts for is NaN, the rest is not."""
    for kind in ("diagonal", "ids"):
        p = operands(20, 40, 16, **features(kind, 20, 40))
        p.k[33] = torch.nan
        args = None, None, EVERYTHING, 2.0
        truth = statistics_truth(p, *args)
        for ours, expected in zip(kernels.pair_stats(p, *args, tile=SMALL, splits=3), truth, strict=True):
            close(ours, expected, 1e-5)
        assert truth[0][0].isnan().any() and truth[1][0].isfinite().any()


@pytest.mark.parametrize("kind", ["two diagonals", "ids"])
def test_a_scale_of_zero_has_a_gradient(kind: str) -> None:
    p = operands(35, 50, 20, **{**features(kind, 35, 50), "column_scale": torch.rand(50) + 0.5})
    p.row_scale[4], p.column_scale[9], p.row_scale[7] = 0.0, 0.0, -2.0
    ours = check(p, EVERYTHING)
    assert ours[4][4] != 0 and ours[5][9] != 0


def test_only_what_is_needed() -> None:
    p = operands(35, 50, 20, **features("two diagonals", 35, 50))
    for needs in (0, 1, 6, 8):
        _, _, *ours = check(p, needs=needs)
        assert [bool(g.numel()) for g in ours] == [bool(needs & bit) for bit in (1, 2, 4, 8)]
    assert check(operands(5, 5, 4))[-1].numel() == 0  # no column_scale, no gradient of it


def test_small_fp16_gradients_do_not_vanish() -> None:
    """A mean over 1e6 rows: every entry of the scratch is under fp16's smallest number until it is lifted."""
    p = operands(35, 50, 20, torch.float16, positive_diagonals=(0,))
    rows, columns = kernels.pair_stats(p, None, None, 1, 1.0, tile=SMALL)
    grads = tuple(torch.randn(*shape) * 1e-6 for shape in ((9, 35), (7, 50)))
    ours = kernels.pair_stats_backward(*grads, rows, columns, p, None, None, 1, 1.0, 4, tile=SMALL)
    truth = gradient_truth(grads, p, None, None, 1, 1.0, needs=4)
    assert (ours[2] - truth[2]).norm() < 1e-3 * truth[2].norm()


def test_strides_and_descriptors() -> None:
    p = operands(35, 50, 21, **features("ids", 35, 50))
    q, k = (torch.nn.functional.pad(t, (3, 0))[:, 3:] for t in (p.q, p.k))
    check(p._replace(q=q, k=k, row_scale=p.row_scale[:1].expand(35)))
    check(p._replace(q=p.q.T.contiguous().T, k=p.k[:1].expand(50, 21)))
    check(operands(35, 50, 32, torch.float16, positive_diagonals=(0,)), tma=True)


def test_reruns_and_chunks() -> None:
    p = operands(40, 65, 16, **features("ids and all else", 40, 65))
    torch.manual_seed(3)
    first = check(p, EVERYTHING)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, check(p, EVERYTHING), strict=True))
    whole = kernels.pair_stats(p, None, None, EVERYTHING, 2.0, tile=SMALL, splits=1)
    close(whole[1], first[1], 1e-5)


@pytest.mark.parametrize("forward,backward", [("triton", "reference"), ("reference", "triton"), ("triton", "triton")])
def test_any_forward_with_any_backward(forward: str, backward: str) -> None:
    p = operands(20, 40, 16, **features("ids and all else", 20, 40))
    rest = torch.rand(20) + 0.5, torch.rand(20), EVERYTHING, 2.0, 3
    grads = torch.randn(9, 20), torch.randn(7, 40)
    with fastloss.use_backend(forward):
        rows, columns, kept = torch.ops.fastloss.pair_stats(*p, *rest)
        assert kept.shape == (3,)
    with fastloss.use_backend(backward):
        ours = torch.ops.fastloss.pair_stats_backward(*grads, rows, columns, kept, *p, *rest, 15)
    close_gradients(ours, gradient_truth(grads, p, *rest[:-1]), torch.float32)


def test_what_is_not_taken_is_said() -> None:
    p = operands(3, 4, 5)
    assert "float64" in fastloss.explain("pair_stats", *p._replace(q=p.q.double(), k=p.k.double()))
    assert "got (3, 0)" in fastloss.explain("pair_stats", *p._replace(k=p.k[:0]))
    assert "count=65" in fastloss.explain("row_topk", *p, 65, 1)
    with fastloss.use_backend("triton"), pytest.raises(ValueError, match="row_scale must have shape"):
        torch.ops.fastloss.pair_stats(*p._replace(row_scale=torch.ones(2)))
