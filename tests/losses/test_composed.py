"""Losses made of a few lines of PyTorch, against independent formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses

F64 = torch.float64


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale


def agree(ours: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad(ours.sum(), inputs, retain_graph=True)
    true = torch.autograd.grad(want.sum(), inputs, retain_graph=True)
    for a, b in zip(got, true, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_early_learning_and_its_targets() -> None:
    table = losses.EarlyLearningTargets(10, 5, beta=0.7, dtype=F64)
    index, y = torch.tensor([3, 9, 0]), torch.tensor([1, 4, 2])
    true = torch.zeros(10, 5, dtype=F64)
    for seed in range(3):
        z = rand(3, 5, seed=seed, scale=2).requires_grad_()
        rows = table(z, index)
        true[index] = 0.7 * true[index] + 0.3 * z.softmax(-1).detach()
        torch.testing.assert_close(table.table, true)
        assert not rows.requires_grad
        ours = fastloss.row_loss(z, y, losses.early_learning, teacher=rows, lam=2.0, reduction="none")
        s = (true[index] * z.softmax(-1)).sum(-1)
        agree(ours, F.cross_entropy(z, y, reduction="none") + 2 * (1 - s).log(), (z,))
    with pytest.raises(ValueError, match="logits must have shape"):
        table(z, index[:2])


def test_weak_to_strong() -> None:
    z, t = rand(6, 7, scale=2).requires_grad_(), rand(6, 7, seed=1)
    q, hard = t.softmax(-1), z.argmax(-1)
    want = -0.7 * (q * F.log_softmax(z, -1)).sum(-1) + 0.3 * F.cross_entropy(z, hard, reduction="none")
    loss = losses.weak_to_strong_confidence
    agree(fastloss.row_loss(z, None, loss, teacher=t, coefficient=0.3, reduction="none"), want, (z,))
    w = (z + F.log_softmax(t, -1)).softmax(-1).detach()
    want = -(w * F.log_softmax(z, -1)).sum(-1)
    teacher = losses.product_teacher(z, t)
    agree(fastloss.row_loss(z, None, losses.product, teacher=teacher, reduction="none"), want, (z,))
    assert losses.confidence_warmup(0.05) == 0.25 and losses.confidence_warmup(0.5) == 0.5


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "upper", "extremes"])
def test_loss_reweighting(strategy: str) -> None:
    x = rand(9).abs().requires_grad_()
    h = 2 * x.detach() / (x.max() - x.min()).item() - (x.max() + x.min()).item() / (x.max() - x.min()).item()
    f = {
        "linupper": lambda h: torch.minimum(h + 1, torch.ones_like(h)),
        "quadratic": lambda h: 1 - h**2,
        "upper": lambda h: (h + 1) / 2,
        "extremes": lambda h: h.abs(),
    }[strategy](h)
    agree(losses.loss_reweighted(x, strategy=strategy), (torch.softmax(f / 0.4, 0) * x).sum(), (x,))
    same = torch.full((4,), 3.0, requires_grad=True)
    losses.loss_reweighted(same, strategy=strategy).backward()
    torch.testing.assert_close(same.grad, torch.full((4,), 0.25))


def test_robust_reductions() -> None:
    x = rand(8).requires_grad_()
    w = torch.softmax(x / 0.5, 0)
    agree(losses.kl_dro(x, r=0.5), (w * x).sum() - 0.5 * (w * (8 * w).log()).sum(), (x,))
    agree(losses.hard_fraction(x, fraction=0.3), x.sort(descending=True).values[:3].mean(), (x,))
    with pytest.raises(ValueError, match="one loss per sample"):
        losses.kl_dro(x[:0])
    f, bags, mean = rand(5, seed=3).requires_grad_(), torch.tensor([0, 1, 1, 0, 1]), rand(2, seed=4)
    square = lambda a, b: (a - b) ** 2  # noqa: E731
    bag = torch.stack([f[bags == b].mean() for b in range(2)])
    want = 0.75 * ((bag - mean) ** 2).mean() + 0.25 * ((f - mean[bags]) ** 2).mean()
    agree(losses.aggregate_response(square, f, mean, bags, rho=0.25), want, (f,))


def test_multi_sample_dropout() -> None:
    x, w, y = rand(4, 6).requires_grad_(), rand(9, 6, seed=1), torch.tensor([1, 8, 3, 0])
    torch.manual_seed(5)
    ours = losses.multi_sample_dropout(lambda h, t: fastloss.linear_cross_entropy(h, w, t), x, y, samples=3)
    torch.manual_seed(5)
    masks = F.dropout(torch.ones(12, 6, dtype=F64), 0.5).reshape(3, 4, 6)
    want = torch.stack([F.cross_entropy((x * m) @ w.T, y) for m in masks]).mean()
    agree(ours, want, (x,))


def test_ensemble_loss_is_the_slope_of_a_convex_loss() -> None:
    f, y = rand(50, scale=2).requires_grad_(), torch.where(rand(50, seed=1) > 0, 1.0, -1.0)
    for seed in range(5):
        loss = losses.ensemble_loss(f, y, generator=torch.Generator().manual_seed(seed))
        (g,) = torch.autograd.grad(loss, f)
        slope = g * y * 50
        assert (slope < 0).all()
        order = (y * f).argsort()
        below = (y * f)[order] <= 1
        assert (slope[order][below].diff() >= 0).all()


def test_confident_bilateral() -> None:
    z, q = rand(40, 2, scale=2).requires_grad_(), rand(40, 2, seed=2, scale=3).softmax(-1)
    p = z.softmax(-1)
    high, yhat = q.max(-1)
    low = q.min(-1).values
    ce = -p.gather(1, yhat[:, None])[:, 0].log() * high
    other = -(1 - p.gather(1, 1 - yhat[:, None])[:, 0]).log() * low
    want = ce[high >= 0.65].mean() + other[low < 0.1].mean()
    agree(losses.confident_bilateral(z, q), want, (z,))


def test_click_and_ranking_losses() -> None:
    a, b, c = (rand(12, seed=s).requires_grad_() for s in range(3))
    y = (rand(12, seed=9) > 0).double()
    bce = lambda x: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean()  # noqa: E731
    want = bce(a) + (bce(b) - bce(a)).clamp(min=0) * bce(b) + (bce(c) - bce(a)).clamp(min=0) * bce(c)
    agree(losses.tri_bce(a, b, c, y), want, (a, b, c))
    s, pnl = rand(2, 6).requires_grad_(), rand(2, 6, seed=1, scale=5)
    rows = []
    for i in range(2):
        best = pnl[i].argsort(descending=True)[:3].tolist()
        pairs = [(best[m], best[n]) for m in range(3) for n in range(m + 1, 3)]
        rows.append(sum(math.log10(pnl[i, m] - pnl[i, n] + 1) * -F.logsigmoid(s[i, m] - s[i, n]) for m, n in pairs) / 3)
    agree(losses.profit_aware_bce(s, pnl), torch.stack(rows), (s,))


def test_masked_bce() -> None:
    z, t = rand(7, 4).requires_grad_(), (rand(7, 4, seed=1) > 0).double()
    trained, valid = torch.tensor([True, False, False, True]), torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    loss = losses.masked_bce(z, t, trained=trained, valid=valid)
    want = F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(-1)[valid].mean()
    torch.testing.assert_close(loss, want)
    (g,) = torch.autograd.grad(loss, z)
    assert (g[:, 1:3] == 0).all() and (g[~valid] == 0).all() and (g[valid][:, [0, 3]] != 0).all()
    bg = rand(20, seed=3).requires_grad_()
    u, chosen = bg.sigmoid(), bg.detach() < 0.5
    agree(losses.background_triplet(bg, chosen), torch.relu((u - 1) ** 2 - u**2)[chosen].mean(), (bg,))
    logits, degree = rand(5, 3).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])
    want = bg.sum() + 0.3 * F.cross_entropy(logits, degree)
    agree(losses.preference_degree(bg.sum(), logits, degree, gamma=0.3), want, (bg, logits))


@pytest.mark.parametrize("n", [(1, 2), (0, -1), 3])
def test_edit_invariant(n: int | tuple[int, ...]) -> None:
    x, w = rand(2, 6, 4).requires_grad_(), rand(15, 4, seed=1).requires_grad_()
    y = torch.randint(0, 15, (2, 5), generator=torch.Generator().manual_seed(0))
    logp = losses.target_logp(x, w, y)
    full = F.log_softmax(x @ w.T, -1)
    agree(logp, torch.stack([full[b][:, y[b]] for b in range(2)]), (x, w))
    want = []
    lengths = (n,) if isinstance(n, int) else n
    for b in range(2):
        total = torch.zeros((), dtype=F64)
        for asked in lengths:
            size = asked if asked > 0 else 5 + asked
            for i in range(5 - size + 1):
                c = torch.stack(
                    [sum(full[b, a + k, y[b, i + k]] for k in range(size)) / size for a in range(6 - size + 1)]
                )
                total = total - (torch.softmax(c, 0) * c).sum()
        want.append(total / len(lengths))
    agree(losses.edit_invariant(logp, n=n), torch.stack(want), (x, w))


def test_edit_invariant_masks_and_noise() -> None:
    logp = rand(1, 6, 5).requires_grad_()
    rows, columns = torch.tensor([[True] * 4 + [False] * 2]), torch.tensor([[True] * 3 + [False] * 2])
    masked = losses.edit_invariant(logp, n=2, input_mask=rows, target_mask=columns)
    agree(masked, losses.edit_invariant(logp[:, :4, :3], n=2), (logp,))
    noisy = losses.edit_invariant(logp, n=2, gumbel=True, generator=torch.Generator().manual_seed(1))
    assert noisy.isfinite().all() and not torch.equal(noisy, losses.edit_invariant(logp, n=2))


def test_approximate_likelihood() -> None:
    logp = -rand(7).abs().requires_grad_()
    chunks = torch.tensor([0, 0, 1, -1, 1, 1, 2])
    student = losses.chunk_logp(logp, chunks, 3)
    torch.testing.assert_close(student, torch.stack([logp[chunks == c].sum() for c in range(3)]))
    teacher = torch.tensor([-0.3, -1.1, -4.0], dtype=F64)
    a, b = teacher / 100 - 1e-6, student / 100 - 1e-6
    want = -(a.exp() * b + (1 - a.exp()) * (1 - b.exp()).log())
    torch.testing.assert_close(losses.approximate_likelihood(student, teacher), want, rtol=1e-9, atol=0)
    far = torch.tensor([0.0, -1e4], dtype=torch.float32, requires_grad=True)
    value = losses.approximate_likelihood(far, torch.tensor([-1e4, 0.0]))
    value.sum().backward()
    assert value.isfinite().all() and far.grad is not None and far.grad.isfinite().all()


def test_sparse_projection() -> None:
    x = rand(20, 8).requires_grad_()
    for k in (1, 3, 8):
        p = losses.sparse_projection(x, k)
        assert ((p > 0).sum(-1) <= k).all() and (p >= 0).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(20, dtype=F64))
        if k == 8:  # the plain projection: its optimality condition is that x - p is constant on the support
            for row, point in zip(x.detach(), p.detach(), strict=True):
                gap = (row - point)[point > 0]
                assert gap.max() - gap.min() < 1e-12 and (row[point == 0] <= gap[0] + 1e-12).all()
    assert torch.autograd.gradcheck(lambda z: losses.sparse_projection(z, 3), (x,))
    top = x.sort(descending=True).values[:, :3].clamp(min=0)
    agree(losses.soft_top_k(x, 3, gamma=2.0), (top**2).sum(-1) / 4, (x,))
    with pytest.raises(ValueError, match="k must be"):
        losses.sparse_projection(x, 9)


def test_class_correlation() -> None:
    z = rand(10, 4).requires_grad_()
    p = z.softmax(-1)
    want = torch.zeros((), dtype=F64)
    for j in range(4):
        row = torch.stack([(p[:, j] * p[:, k]).sum() for k in range(4)])
        want = want + (row.sum() - row[j]) / row.sum() / 4
    agree(losses.class_correlation(z), want, (z,))
    certain = torch.eye(4)[:3] * 1e4
    assert losses.class_correlation(certain) == 0


def test_hyperbolic_geometry() -> None:
    x, y = (losses.exponential_map(rand(6, 5, seed=s)) for s in range(2))
    c = 0.1
    # the distance by its other closed form, arcosh
    gap = ((x - y) ** 2).sum(-1)
    inside = (1 - c * (x * x).sum(-1)) * (1 - c * (y * y).sum(-1))
    want = torch.acosh(1 + 2 * c * gap / inside) / c**0.5
    torch.testing.assert_close(losses.poincare_distance(x, y), want)
    points = torch.cat((x, y)).requires_grad_()
    torch.testing.assert_close(losses.pairwise_confusion(points), want.mean())
    features, planes, normals = (
        rand(6, 5).requires_grad_(),
        losses.exponential_map(rand(2, 5, seed=4)),
        rand(2, 5, seed=5),
    )
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    rows = losses.hyperbolic_cross_entropy(features, target, planes, normals)
    mapped = losses.exponential_map(features)
    logits = []
    for k in range(2):
        m = losses.mobius_add(-planes[k].expand_as(mapped), mapped)
        a = normals[k]
        lam = 2 / (1 - c * (planes[k] ** 2).sum())
        ratio = 2 * c**0.5 * (m @ a) / ((1 - c * (m * m).sum(-1)) * a.norm())
        logits.append(lam * a.norm() / c**0.5 * torch.asinh(ratio))
    agree(rows, F.cross_entropy(torch.stack(logits, -1), target, reduction="none"), (features,))
    zero = torch.zeros(2, 5, requires_grad=True)
    losses.pairwise_confusion(losses.exponential_map(zero)).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_cauchy_schwarz_dependence() -> None:
    x, y = rand(12, 3).requires_grad_(), rand(12, 1, seed=1)
    k = torch.stack([torch.stack([(-((a - b) ** 2).sum() / 2).exp() for b in x]) for a in x])
    m = torch.stack([torch.stack([(-((a - b) ** 2).sum() / 3).exp() for b in y]) for a in y])
    one = torch.ones(12, dtype=F64)
    want = -2 * torch.log2(one @ k @ m @ one / 12**3) + torch.log2(torch.trace(k @ m.T) / 144)
    want = want + torch.log2(k.sum() * m.sum() / 12**4)
    ours = losses.cauchy_schwarz_dependence(x, y, sigma_x=2.0, sigma_y=3.0)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)
    losses.cauchy_schwarz_dependence(x, y).backward()
    assert x.grad is not None and x.grad.isfinite().all()
