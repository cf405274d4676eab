"""Losses that are no row loss of one matrix: routers, mixtures, batch calibration. And the catalogue that knows them all."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses
from row_loss_checks import N, V, problem


def same(ours: Tensor, truth: Tensor, leaf: Tensor) -> None:
    """Equal values, and equal gradients of the sums."""
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    gradients = (torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (ours, truth))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_balance(top_k: int) -> None:
    z = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    p = z.softmax(-1).reshape(-1, 5)
    counts = F.one_hot(p.topk(top_k).indices, 5).double().sum((0, 1)) / 21
    same(losses.load_balance(z, top_k=top_k, coefficient=0.3), 0.3 * 5 * (counts * p.mean(0)).sum(), z)
    valid = torch.rand(3, 7) < 0.6
    kept = z[valid]
    truth = losses.load_balance(kept, top_k=top_k)
    same(losses.load_balance(z, top_k=top_k, valid=valid), truth, z)
    poisoned = z.detach().clone()
    poisoned[~valid] = torch.nan
    poisoned.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.load_balance(poisoned, top_k=top_k, valid=valid), poisoned)
    assert (gradient[~valid] == 0).all() and gradient.isfinite().all()
    assert losses.load_balance(z, top_k=top_k, valid=torch.zeros(3, 7, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 5\], got 6"):
        losses.load_balance(z, top_k=6)
    with pytest.raises(ValueError, match=r"valid must have shape \(3, 7\)"):
        losses.load_balance(z, valid=valid[:2])


def test_dynmole() -> None:
    z = (torch.randn(40, 6, dtype=torch.float64) * 2).requires_grad_()
    z.data[0] = 0  # as uncertain as can be: all experts
    z.data[1] = torch.tensor([9.0, 8, 0, 0, 0, 0])  # two experts, though the first alone is beyond top_p
    mask = losses.dynmole_routing(z)
    p = z.softmax(-1)
    assert mask[0].all() and mask[1].tolist() == [True, True] + [False] * 4
    entropy = (1 - (p**1.1).sum(-1)) / (1 - 6**-0.1)
    for row in range(2, 40):
        descending = p[row].argsort(descending=True).tolist()
        kept = [j for i, j in enumerate(descending) if i < 2 or p[row][descending[: i + 1]].sum() <= 0.75]
        expected = set(range(6)) if entropy[row] > 0.9 else set(kept)
        assert set(mask[row].nonzero().flatten().tolist()) == expected
    same(losses.dynmole_load_balance(z, mask), 1e-3 * 6 * ((p * mask).mean(0) * p.mean(0)).sum(), z)
    valid = torch.arange(40) % 3 != 0
    same(losses.dynmole_load_balance(z, mask, valid=valid), losses.dynmole_load_balance(z[valid], mask[valid]), z)
    with pytest.raises(ValueError, match=r"shape of gate_logits, \(40, 6\), got \(3, 6\)"):
        losses.dynmole_load_balance(z, mask[:3])


def test_mixup_ranking() -> None:
    z = torch.randn(2, N, V, dtype=torch.float64, requires_grad=True)
    raw, mixed = (fastloss.row_stats(t, None, stats="argmax") for t in z)
    differs = torch.arange(N) % 4 != 0
    truth = F.relu(z[1].amax(1) - z[0].amax(1) + 0.1)
    same(losses.mixup_ranking(raw, mixed), truth, z)
    same(losses.mixup_ranking(raw, mixed, partner_differs=differs), truth * differs, z)
    with pytest.raises(ValueError, match="one mixed row a raw row"):
        losses.mixup_ranking(raw, fastloss.row_stats(z[1, :2], None, stats="argmax"))


def test_mixup_ndcg() -> None:
    z = torch.randn(4, N, V, dtype=torch.float64)
    z[:, ::2] *= 9  # confidences near 1, so that their gain is beyond the ideal one
    z.requires_grad_()
    shares = torch.rand(3, N, dtype=torch.float64) / 2 + 0.5
    raw, *mixed = (fastloss.row_stats(t, None, stats="argmax") for t in z)
    confidence = z.softmax(-1).amax(-1)
    rows = []
    for i in range(N):
        order = shares[:, i].argsort(descending=True)
        got, best = [confidence[0, i], *confidence[1:, i][order]], [torch.tensor(1.0), *shares[:, i][order]]
        dcg, ideal = (
            sum(v / torch.log2(torch.tensor(k + 2.0).double()) for k, v in enumerate(values)) for values in (got, best)
        )
        rows.append(1 - torch.minimum(dcg / ideal, ideal / dcg))
    same(losses.mixup_ndcg(raw, mixed, shares), torch.stack(rows), z)
    with pytest.raises(ValueError, match=r"shares must have shape \(3, 9\), got \(2, 9\)"):
        losses.mixup_ndcg(raw, mixed, shares[:2])


def test_logit_margin() -> None:
    z = (torch.randn(N, V, dtype=torch.float64) * 20).requires_grad_()
    same(losses.logit_margin(z, margin=7), F.relu(z.amax(-1, keepdim=True) - z - 7).mean(-1), z)
    masked = torch.tensor([[50.0, 0.0, -torch.inf], [-torch.inf] * 3], requires_grad=True)
    rows = losses.logit_margin(masked)
    torch.testing.assert_close(rows, torch.tensor([40.0 / 3, 0.0]))
    assert torch.autograd.grad(rows.sum(), masked)[0].isfinite().all()
    with pytest.raises(ValueError, match="margin must be >= 0, got -1"):
        losses.logit_margin(z, margin=-1)


def test_mmce() -> None:
    z, y = problem(torch.float64)
    z.requires_grad_()
    ours = losses.mmce(fastloss.row_stats(z, y, stats="argmax"), width=0.3)
    keep = y != -100
    r, right = z[keep].softmax(-1).amax(-1), z[keep].argmax(-1) == y[keep]
    total = sum(
        (float(a) - p) * (float(b) - q) * torch.exp(-(p - q).abs() / 0.3)
        for a, p in zip(right, r, strict=True)
        for b, q in zip(right, r, strict=True)
    )
    same(ours, torch.as_tensor(total).sqrt() / int(keep.sum()), z)
    alone = torch.tensor([[5.0, -torch.inf]], requires_grad=True)
    perfect = losses.mmce(fastloss.row_stats(alone, torch.tensor([0]), stats="argmax"))
    assert perfect == 0 and torch.autograd.grad(perfect, alone)[0].isfinite().all()


def test_mdca() -> None:
    z, y = problem(torch.float64)
    z.requires_grad_()
    keep = y != -100
    apart = z[keep].softmax(-1).mean(0) - torch.bincount(y[keep], minlength=V) / int(keep.sum())
    same(losses.mdca(z, y), apart.abs().mean(), z)
    with pytest.raises(ValueError, match=r"shape \(9,\), got \(4,\)"):
        losses.mdca(z, y[:4])


def test_the_catalogue_knows_every_loss() -> None:
    """What is exported has a docstring; entries have their sentences, and row losses take what they say they take."""
    known = {"entropy", "sum", "tempered_lse", "argmax", "sumsq", "teacher_lse", "teacher_mean", "score_mean"}
    for name in losses.__all__:
        thing = getattr(losses, name)
        entry = losses.catalogue.find(thing) if inspect.isfunction(thing) else None
        assert thing.__doc__, name
        if entry is None:
            continue
        assert entry.name == name and entry.formula and entry.gradient and entry.source, name
        if entry.rows:
            parameters = {p.name: 1.0 for p in list(inspect.signature(thing).parameters.values())[1:]}
            assert set(entry.needs({**parameters, **entry.defaults})) <= known
