"""The pair functions as users call them: ops, classes and masks, x with itself, batches. Gradients: test_pairs_grad.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastloss
from dense_pairs import ROWS_AND_COLUMNS, dense_stats, equal, mask_of, values
from fastloss import Diagonal, PairMask, SameId, edge_dot_csr, pair_stats
from fastloss import row_topk as top
from fastloss.contract import PairFunction
from fastloss.pairs.classes import members

OPS = torch.ops.fastloss
INF, NAN = float("inf"), float("nan")


# ---------------------------------------------------------------------------------------------- ops


def pairing(dtype: torch.dtype, everything: bool) -> tuple[Any, ...]:
    """The first seventeen arguments of an op, only what is needed or all."""
    m, n, d = 5, 34, 3
    q, k, row_scale = torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype), torch.rand(m)
    wide = torch.promote_types(dtype, torch.float32)
    if not everything:
        return (q, k, row_scale.to(wide), None, None, None, None, None, (0,), None, None, (), *(None,) * 5)
    bits = torch.randint(-(2**31), 2**31 - 1, (m, 2), dtype=torch.int32)
    low, high, limit = (x.to(wide) for x in (torch.full((m,), -1.0), torch.full((m,), 2.0), torch.rand(m)))
    return (
        q, k, row_scale.to(wide), torch.rand(n).to(wide), torch.tensor([1, 1, 0, 1, 1], dtype=torch.uint8),
        (torch.rand(n) < 0.8).to(torch.uint8), torch.randint(3, (m,)).int(), torch.randint(3, (n,)).int(), (0, 2),
        bits, None, (1,), low, high, torch.randn(m, 2).to(dtype), torch.randn(n, 2).to(dtype), limit,
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype, everything", [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False), (torch.float32, False)]
)
def test_opcheck(dtype: torch.dtype, everything: bool) -> None:
    p = pairing(dtype, everything)
    m, n, wide = len(p[0]), len(p[1]), p[2].dtype
    want = 7 if everything else 0
    tail = (torch.rand(m).to(wide) + 1, torch.rand(m).to(wide), want, 0.5, 0) if everything else (None, None, 0, 1.0, 0)
    check = torch.library.opcheck
    check(OPS.pair_stats.default, (*p, *tail))
    rows, columns, kept = OPS.pair_stats(*p, *tail)
    assert rows.shape == (9, m) and columns.shape == (7, n if everything else 0)
    for needs in (15, 6):
        gradients = (torch.randn_like(rows), torch.randn_like(columns))
        check(OPS.pair_stats_backward.default, (*gradients, rows, columns, kept, *p, *tail, needs))
    thresholds = (torch.rand(m).to(wide), torch.rand(m).to(wide)) if everything else (None, None)
    check(OPS.pair_map.default, (*p, *thresholds, int(PairFunction.HINGE)))
    check(OPS.pair_map_backward.default, (torch.randn(8, m).to(wide), *p, *thresholds, 0, 15))
    check(OPS.pair_histogram.default, (*p, 6, -1.0, 0.5))
    check(OPS.pair_histogram_backward.default, (torch.randn(2, 6).to(wide), *p, 6, -1.0, 0.5, 15))
    check(OPS.row_topk.default, (*p, 3, 3))
    ids = torch.tensor([4, 0, 0]), torch.tensor([1, 33, 33])
    check(OPS.edge_dot.default, (p[0], p[1], *ids))
    check(OPS.edge_sum.default, (p[1], torch.randn(3).to(wide), torch.tensor([0, 1, 1, 3]), ids[1]))


def test_explain_is_readable() -> None:
    q, k = torch.randn(4, 8), torch.randn(5, 8)
    first, *rest = fastloss.explain("pair_stats", q, k, torch.ones(4)).splitlines()
    assert first.startswith("pair_stats on cpu: ") and first.split(": ")[1] in ("cpp", "reference")
    assert [line.split()[0] for line in rest] == list(fastloss.registry.BACKENDS) and rest[-1].endswith("ok")
    wide = fastloss.explain("pair_stats", q.double(), k.double(), torch.ones(4).double())
    assert wide.startswith("pair_stats on cpu: reference")


# ---------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65, 100])
def test_a_mask_packs_to_bits(n: int) -> None:
    mask = torch.rand(7, n) < 0.4
    mask[0], mask[1] = True, False
    words = members("positive", PairMask(mask), 7, n, mask.device).rows
    assert words is not None and words.dtype == torch.int32 and words.shape == (7, -(-n // 32))
    back = (words[:, torch.arange(n) // 32] >> (torch.arange(n) % 32)) & 1
    assert torch.equal(back.bool(), mask)
    q, k = torch.randn(7, 4), torch.randn(n, 4)
    for positive in (PairMask(mask), PairMask(words)):
        stats = pair_stats(q, k, positive=positive)
        equal(stats.pos_count, mask.sum(1).float())
        equal(stats.columns.neg_count, (~mask).sum(0).float())
    torch.testing.assert_close(
        stats.neg_lse, torch.where(mask, -INF, q @ k.t()).logsumexp(1), rtol=1e-5, atol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("side", ["positive", "excluded"])
def test_ids_beyond_int32_are_told_apart(side: str) -> None:
    """Ids that are equal in their low 32 bits, and in none of the two that are compared."""
    high = 1 << 40
    rows = torch.tensor([5, 5 + high, -high, 7, high])
    columns = torch.tensor([5, 5 + high, 5 + 2 * high, -high, 7 + (1 << 32), 0, high])
    for a, b in ((rows, columns), (rows.int() // 3, columns), (rows // high, (columns // high).to(torch.int16))):
        stats = pair_stats(torch.randn(5, 3), torch.randn(7, 3), **{"positive": None, side: SameId(a, b)})
        same = (a.long()[:, None] == b.long()).sum(1).float()
        equal(stats.pos_count if side == "positive" else 7 - stats.neg_count, same)


def test_union_of_classes_and_precedence() -> None:
    """Excluded beats positive, positive beats negative."""
    ids = torch.tensor([0, 1, 0, 2, 1, 3])
    positive, excluded = (SameId(ids), Diagonal(1, 2)), (Diagonal(2), PairMask(torch.rand(6, 6) < 0.2))
    q = torch.randn(6, 4, dtype=torch.float64)
    k = torch.randn(6, 4, dtype=torch.float64)
    right = dense_stats(q, k, positive=positive, excluded=excluded)
    for name, value in values(pair_stats(q, k, positive=positive, excluded=excluded), right).items():
        torch.testing.assert_close(value, right[name].to(value.dtype), msg=name)
    own, out = mask_of(positive, 6, 6), mask_of(excluded, 6, 6)
    topped = top(q, k, 6, among="positive", positive=positive, excluded=excluded)
    assert [sorted(c for c in row if c >= 0) for row in topped.columns.tolist()] == [
        (own & ~out)[i].nonzero()[:, 0].tolist() for i in range(6)
    ]


def test_a_queue_may_hold_anything_where_it_is_not_filled() -> None:
    q, k = torch.randn(4, 8, requires_grad=True), torch.randn(12, 8)
    valid = torch.arange(12) < 7
    k[~valid] = torch.tensor([NAN, INF, -INF, 1e38, NAN, 0.0, NAN, INF])
    k.requires_grad_()
    for normalize in (False, True):
        stats = pair_stats(q, k, normalize=normalize, column_valid=valid)
        part = pair_stats(q, k.detach()[:7], normalize=normalize)
        equal(stats.nll, part.nll, 1e-6)
        dq, dk = torch.autograd.grad(stats.nll.sum() + stats.columns.nll.sum(), (q, k))
        assert dq.isfinite().all() and dk.isfinite().all() and not dk[7:].any()
        assert (stats.columns.neg_lse[7:] == -INF).all() and not stats.columns.pos_count[7:].any()


# ---------------------------------------------------------------------------------------------- x with itself


def self_cases(m: int) -> dict[str, dict[str, Any]]:
    ids = torch.randint(0, 4, (m,))
    return {
        "plain": {"positive": None},
        "views": {"positive": Diagonal(m // 2, -(m // 2)), "normalize": True},
        "same id": {"positive": SameId(ids), "normalize": True},
        "excluded ids": {"positive": Diagonal(1, -1), "excluded": SameId(ids)},
        "valid": {"positive": SameId(ids), "row_valid": torch.rand(m) < 0.7, "normalize": True},
        "not symmetric": {"positive": Diagonal(1), "normalize": True},
        "mean": {"positive": SameId(ids), "mean": True, "second_scale": 2.0},
        "mask": {"positive": PairMask(torch.rand(m, m) < 0.2)},
        "scale of each row": {"positive": SameId(ids), "scale": torch.rand(m, dtype=torch.float64) + 0.5},
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", self_cases(2))
def test_x_with_itself(case: str, dtype: torch.dtype) -> None:
    """Without k: the same as k = x with the diagonal excluded, and as the dense formula, with a trained scale too."""
    m = 38
    arguments = self_cases(m)[case]
    x = torch.randn(m, 6, dtype=torch.float64).to(dtype)
    scale = arguments.pop("scale", torch.tensor(1.7, dtype=torch.float64)).to(dtype)
    given = {"bias": 0.2, **arguments}
    full = {**given, "excluded": (Diagonal(0), *([given["excluded"]] if "excluded" in given else []))}
    if "row_valid" in given:
        full["column_valid"] = given["row_valid"]
    names = ROWS_AND_COLUMNS + ["neg_mean", "second_neg_lse"] * (case == "mean")
    found = []
    for call in (
        lambda x, s: values(pair_stats(x, scale=s, **given), names),
        lambda x, s: values(pair_stats(x, x, scale=s, **full), names),
        lambda x, s: dense_stats(x, x, scale=s, **full),
    ):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        table = {name: value for name, value in call(*leaves).items() if name in names}
        g = torch.Generator().manual_seed(1)
        loss = sum(
            (torch.randn(m, generator=g).to(dtype) * table[name].masked_fill(table[name] == -INF, 0.0)).sum()
            for name in sorted(table)
        )
        found.append((table, torch.autograd.grad(loss, leaves)))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for table, gradients in found[1:]:
        for name in table:
            torch.testing.assert_close(found[0][0][name], table[name], rtol=tolerance, atol=tolerance, msg=name)
        for a, b in zip(found[0][1], gradients, strict=True):
            assert (a - b).norm() <= tolerance * b.norm(), (case, a, b)


def test_the_callers_tensors_are_unchanged() -> None:
    given = [torch.randn(6, 4), torch.randn(7, 4), torch.rand(6) + 0.5, torch.rand(7) + 0.5]
    extra = [torch.rand(6, 7) < 0.3, torch.rand(6) < 0.8, torch.rand(7) < 0.8]
    before = [x.clone() for x in (*given, *extra)]
    q, k, scale, column_scale = (x.requires_grad_() for x in given)
    for normalize in (False, True):
        stats = pair_stats(
            q, k, scale=scale, column_scale=column_scale, normalize=normalize, positive=PairMask(extra[0]),
            row_valid=extra[1], column_valid=extra[2],
        )  # fmt: skip
        (stats.nll.sum() + stats.columns.nll.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip((*given, *extra), before, strict=True))


def test_a_batch_is_its_samples() -> None:
    b, m, n = 3, 5, 6
    q, k = torch.randn(b, m, 4, requires_grad=True), torch.randn(b, n, 4, requires_grad=True)
    ids, scale, mask = torch.randint(0, 3, (b, m)), torch.rand(b, m) + 0.5, torch.rand(b, m, n) < 0.2
    valid = torch.rand(b, n) < 0.8
    each = [
        pair_stats(
            q[i], k[i], scale=scale[i], bias=0.3, positive=SameId(ids[i], torch.arange(n)), excluded=PairMask(mask[i]),
            column_valid=valid[i],
        )
        for i in range(b)
    ]  # fmt: skip
    whole = pair_stats(
        q, k, scale=scale, bias=0.3, positive=SameId(ids, torch.arange(n).expand(b, n)), excluded=PairMask(mask),
        column_valid=valid,
    )  # fmt: skip
    for name, value in values(whole, ROWS_AND_COLUMNS).items():
        assert value.shape == (b, n if "columns" in name else m)
        torch.testing.assert_close(value, torch.stack([values(one, [name])[name] for one in each]))
    ours, theirs = (torch.autograd.grad(loss, (q, k)) for loss in (whole.nll.sum(), sum(one.nll.sum() for one in each)))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)
    one = pair_stats(q, positive=None)
    torch.testing.assert_close(one.neg_lse[1], pair_stats(q[1], positive=None).neg_lse)
    with pytest.raises(ValueError, match=r"a batch is q \[B, M, D\] and k \[B, N, D\]"):
        pair_stats(q, k[:2])


def test_edge_dot_csr_is_edge_dot() -> None:
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    pointer, columns = torch.tensor([0, 2, 2, 3, 6]), torch.tensor([4, 0, 1, 1, 1, 3])
    rows = torch.tensor([0, 0, 2, 3, 3, 3])
    equal(edge_dot_csr(q, k, pointer, columns), (q[rows] * k[columns]).sum(1), 1e-6)
    (dq,) = torch.autograd.grad(edge_dot_csr(q, k, pointer, columns).sum(), q)
    equal(dq, torch.zeros(4, 3).index_add(0, rows, k[columns]), 1e-6)
