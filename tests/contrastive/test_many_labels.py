"""Decoupled softmax and soft top-k against their dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_checks import NEG, agree, agree_in, cosines, leaves
from fastloss.contrastive import DecoupledSoftmaxLoss, SoftTopKLoss, decoupled_softmax_loss, soft_topk_loss
from fastloss.contrastive.sparse_positives import edge_mask, rows_of, sample_edges

#: 5 rows and 70 labels: row 2 has none, row 3 has one, columns 31, 32 and 63 are at the edges of words.
ROWS = torch.tensor([0, 4, 1, 0, 3, 1, 4, 4, 0])
COLUMNS = torch.tensor([3, 31, 32, 69, 63, 64, 0, 33, 31])


def positive_mask(m=5, n=70):
    return torch.zeros(m, n, dtype=torch.bool).index_put((ROWS, COLUMNS), torch.tensor(True))


def dense_decoupled(q, k, temperature=0.05, weight=None, normalize=False):
    z = (cosines(q, k) if normalize else q @ k.t()) / temperature
    positive = positive_mask()
    lse = torch.logsumexp(z.masked_fill(positive, NEG), 1, keepdim=True)
    terms = torch.logaddexp(lse.expand_as(z), z) - z
    if weight is not None:
        terms = terms * torch.zeros_like(z).index_put((ROWS, COLUMNS), weight)
    return torch.where(positive, terms, 0.0).sum(1) / positive.sum(1).clamp(min=1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_decoupled(normalize, weighted):
    q, k = leaves((5, 8), (70, 8))
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(9, dtype=torch.float64) if weighted else None
    right = dense_decoupled(q, k, tau, weight, normalize)
    for reduction, value in (("none", right), ("mean", right.mean()), ("mean_valid", right.sum() / 4)):
        ours = decoupled_softmax_loss(q, k, ROWS, COLUMNS, tau, weight=weight, normalize=normalize, reduction=reduction)
        agree(ours, value, (q, k, tau))


def test_csr_and_duplicates():
    q, k = leaves((5, 8), (70, 8))
    order = ROWS.argsort(stable=True)
    pointer = torch.tensor([0, 3, 5, 5, 6, 9])
    assert torch.equal(rows_of(pointer, 9), ROWS[order])
    ours = decoupled_softmax_loss(q, k, rows_of(pointer, 9), COLUMNS[order])
    agree(ours, dense_decoupled(q, k).mean(), (q, k))
    twice = edge_mask(ROWS.repeat(2), COLUMNS.repeat(2), 5, 70).mask
    bits = (twice[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    assert torch.equal(bits.flatten(1)[:, :70].bool(), positive_mask())


def test_loss_sample_draws_one_positive_and_hides_the_others():
    q, k = leaves((5, 8), (70, 8))
    positive = positive_mask()
    z = q @ k.t() / 0.05
    lse = torch.logsumexp(z.masked_fill(positive, NEG), 1)
    seen = set()
    for seed in range(20):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        drawn = sample_edges(ROWS, 5, None, generators[0])
        assert torch.equal(ROWS[drawn].sort().values, torch.tensor([0, 1, 3, 4]))
        seen |= set(zip(ROWS[drawn].tolist(), COLUMNS[drawn].tolist(), strict=True))
        right = torch.zeros(5, dtype=torch.float64).index_put(
            (ROWS[drawn],),
            torch.logaddexp(lse[ROWS[drawn]], z[ROWS[drawn], COLUMNS[drawn]]) - z[ROWS[drawn], COLUMNS[drawn]],
        )
        ours = decoupled_softmax_loss(q, k, ROWS, COLUMNS, loss_sample=True, generator=generators[1], reduction="none")
        agree(ours, right, (q, k))
    assert len(seen) == 9


def test_sampling_follows_the_weights():
    rows, weight = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 0.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sum(sample_edges(rows, 1, weight, generator).int() for _ in range(800))
    assert drawn[1] == 0 and 130 < drawn[0] < 270


def dense_soft_topk(q, k, temperature, top, alpha, normalize=True, weight=None):
    """t by a long bisection of the whole matrix; its gradient by the formula of the implicit function, in the dense matrix."""
    x = (cosines(q, k) if normalize else q @ k.t()) / temperature

    class LogTopK(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            low, high = -x.amax(1) - 50 / alpha, -x.amin(1) + 50 / alpha
            for _ in range(200):
                middle = (low + high) / 2
                below = torch.sigmoid(alpha * (x + middle[:, None])).sum(1) < top
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            z = alpha * (x + ((low + high) / 2)[:, None])
            ctx.save_for_backward(torch.sigmoid(z))
            return F.logsigmoid(z)

        @staticmethod
        def backward(ctx, g):
            (s,) = ctx.saved_tensors
            v, u = alpha * s * (1 - s), g * alpha * (1 - s)
            return u - u.sum(1, keepdim=True) * v / v.sum(1, keepdim=True)

    terms = -LogTopK.apply(x)
    if weight is not None:
        terms = terms * torch.zeros_like(x).index_put((ROWS, COLUMNS), weight)
    positive = positive_mask()
    return torch.where(positive, terms, 0.0).sum(1) / positive.sum(1).clamp(min=1)


@pytest.mark.parametrize(
    ("top", "alpha"), [(5, 2.0), (1, 1.0), (69, 2.0), (torch.tensor([1.0, 2.0, 3.0, 30.0, 60.0]), 0.5)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_soft_topk(top, alpha, normalize):
    q, k = leaves((5, 8), (70, 8))
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(9, dtype=torch.float64)
    right = dense_soft_topk(q, k, tau, top, alpha, normalize, weight)
    ours = soft_topk_loss(
        q, k, ROWS, COLUMNS, tau, top=top, alpha=alpha, weight=weight, normalize=normalize, reduction="none"
    )
    agree(ours, right, (q, k, tau))


def test_soft_topk_at_the_published_temperature():
    q, k = leaves((5, 8), (70, 8))
    agree(SoftTopKLoss(normalize=True)(q, k, ROWS, COLUMNS), dense_soft_topk(q, k, 0.05, 5, 2.0).mean(), (q, k))


def test_soft_topk_keeps_no_matrix():
    q, k = torch.randn(5, 8, requires_grad=True), torch.randn(4000, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        soft_topk_loss(q, k, ROWS, COLUMNS).backward()
    assert max(saved) <= 4000 * 8 and sum(saved) < 6 * 4000 * 8


def test_soft_topk_of_a_gap_is_finite():
    """Where nothing lies between the K best and the rest, the threshold does not move: no gradient, and no NaN."""
    k = torch.eye(8)
    q = (100 * torch.eye(8)[:2]).requires_grad_()
    loss = soft_topk_loss(q, k, torch.tensor([0, 1]), torch.tensor([0, 2]), 0.05, top=1)
    assert loss.isfinite() and torch.autograd.grad(loss, q)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    inputs = leaves((5, 16), (70, 16))
    agree_in(
        dtype, lambda q, k: decoupled_softmax_loss(q, k, ROWS, COLUMNS, 0.2, normalize=True),
        lambda q, k: dense_decoupled(q, k, 0.2, normalize=True).mean(), inputs,
    )  # fmt: skip
    agree_in(
        dtype, lambda q, k: soft_topk_loss(q, k, ROWS, COLUMNS, 0.2, normalize=True),
        lambda q, k: dense_soft_topk(q, k, 0.2, 5, 2.0).mean(), inputs, k=16,
    )  # fmt: skip


def test_module():
    q, k = leaves((5, 8), (70, 8))
    assert torch.equal(DecoupledSoftmaxLoss()(q, k, ROWS, COLUMNS), decoupled_softmax_loss(q, k, ROWS, COLUMNS, 0.05))


@pytest.mark.parametrize("loss", [decoupled_softmax_loss, soft_topk_loss])
def test_bad_input(loss):
    q, k = torch.randn(5, 8), torch.randn(70, 8)
    for call, message in (
        (lambda: loss(q, k, ROWS, COLUMNS[:3]), "E. both"),
        (lambda: loss(q, k, ROWS, COLUMNS, 0.0), "temperature must be"),
        (lambda: loss(q, k, ROWS, COLUMNS, torch.ones(5)), "one element"),
        (lambda: loss(q, k, ROWS, COLUMNS, weight=torch.ones(3)), "weight must be"),
        (lambda: soft_topk_loss(q, k, ROWS, COLUMNS, top=70), "top must be"),
        (lambda: soft_topk_loss(q, k, ROWS, COLUMNS, top=0), "top must be"),
        (lambda: soft_topk_loss(q, k, ROWS, COLUMNS, alpha=0.0), "alpha must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError):
        loss(q, k, ROWS, COLUMNS + 60)
    with pytest.raises(TypeError, match="integers"):
        loss(q, k, ROWS, COLUMNS.float())


def test_soft_topk_is_not_differentiated_twice():
    q, k = leaves((5, 8), (70, 8))
    once = torch.autograd.grad(soft_topk_loss(q, k, ROWS, COLUMNS, normalize=True), (q, k))
    kept = torch.autograd.grad(soft_topk_loss(q, k, ROWS, COLUMNS, normalize=True), (q, k), create_graph=True)
    for a, b in zip(kept, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="soft_topk_loss can be differentiated once"):
        kept[0].square().sum().backward()

    def loss(q):
        return soft_topk_loss(q, k.detach(), ROWS, COLUMNS, normalize=True)

    torch.testing.assert_close(torch.func.jacfwd(loss)(q.detach()), once[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(loss)(q.detach()), once[0], rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="soft_topk_loss can be differentiated once"):
        torch.func.hessian(loss)(q.detach())
