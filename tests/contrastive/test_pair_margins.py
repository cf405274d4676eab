"""contrastive_loss, tcm_loss, the OPIS metric and the order statistics under it, against dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import contrastive_loss, operating_point_inconsistency, order_statistics, tcm_loss


def classes(x, labels, k=None, key_labels=None, normalize=True):
    own = k is None
    k, key_labels = (x, labels) if own else (k, key_labels)
    if normalize:
        x, k = F.normalize(x, dim=1), F.normalize(k, dim=1)
    same = labels[:, None] == key_labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool) if own else same
    return x @ k.t(), positive, ~same


def mean_over(values, chosen):
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def dense_contrastive(x, labels, k=None, key_labels=None, pos=1.0, neg=0.0, power=1, average="active"):
    s, positive, negative = classes(x, labels, k, key_labels)
    pulled, pushed = (pos - s).relu() ** power, (s - neg).relu() ** power
    if average == "active":
        positive, negative = positive & (s <= pos), negative & (s >= neg)
    return mean_over(pulled, positive) + mean_over(pushed, negative)


def dense_tcm(x, labels, k=None, key_labels=None, pos=0.9, neg=0.5, weights=(1.0, 1.0)):
    s, positive, negative = classes(x, labels, k, key_labels)
    positive, negative = positive & (s <= pos), negative & (s >= neg)
    return weights[0] * mean_over(pos - s, positive) + weights[1] * mean_over(s - neg, negative)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("average", ["active", "pairs"])
@pytest.mark.parametrize("squared", [False, True])
def test_contrastive(squared, average, keys):
    labels = torch.arange(21) % 4
    more = (lambda k: (k, labels.flip(0))) if keys else (lambda k: (None, None))
    options = {"squared": squared, "average": average}
    check_same(
        lambda x, k: contrastive_loss(x, labels, *more(k), pos_margin=0.8, neg_margin=0.1, **options),
        lambda x, k: dense_contrastive(x, labels, *more(k), 0.8, 0.1, 1 + squared, average),
        embeddings(21, 5),
    )


@pytest.mark.parametrize("keys", [False, True])
def test_tcm(keys):
    x, k = embeddings(30, 3)
    labels = torch.arange(30) % 7
    more = (lambda k: (k, labels.flip(0))) if keys else (lambda k: (None, None))
    check_same(
        lambda x, k: tcm_loss(x, labels, *more(k), pos_weight=0.7, neg_weight=1.5),
        lambda x, k: dense_tcm(x, labels, *more(k), weights=(0.7, 1.5)),
        [x, k],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tcm_narrow(dtype):
    labels = torch.arange(33) % 4
    x = embeddings(33, 8, seed=2, count=1)
    # bf16 rounds pairs across a margin in the dense formula, whose counts then differ: its inputs stay, its matrix is float32
    check_narrow(
        lambda x: tcm_loss(x, labels),
        lambda x: dense_tcm(x.float() if x.dtype == torch.bfloat16 else x, labels),
        x,
        dtype,
    )


def test_no_hard_pair():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], requires_grad=True)
    loss = tcm_loss(x, torch.tensor([0, 0, 1, 1]))
    assert float(loss.detach()) == 0 and float(torch.autograd.grad(loss, x)[0].abs().sum()) == 0
    assert float(tcm_loss(x[:1], torch.tensor([0]))) == 0


def test_bad_input():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"labels must have shape \[3\]"):
        tcm_loss(x, torch.arange(2))
    with pytest.raises(TypeError, match="must be integers"):
        contrastive_loss(x, torch.rand(3))
    with pytest.raises(ValueError, match="go together"):
        tcm_loss(x, torch.arange(3), x)
    with pytest.raises(ValueError, match="'active' or 'pairs'"):
        contrastive_loss(x, torch.arange(3), average="all")
    with pytest.raises(ValueError, match="pos_weight"):
        tcm_loss(x, torch.arange(3), pos_weight=-1)


@pytest.mark.parametrize("held", [1, 40, 1 << 20])
@pytest.mark.parametrize("sample", [16, 1 << 15])
def test_order_statistics_are_exact(monkeypatch, held, sample):
    monkeypatch.setattr(order_statistics, "_PASS", 100)  # several blocks
    monkeypatch.setattr(order_statistics, "_SAMPLE", sample)
    x = torch.randn(31, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    labels = torch.arange(31) % 3
    s, _, negative = classes(x, labels, normalize=False)
    right = s[negative.triu(1)].sort().values
    ranks = [0, 1, 7, len(right) // 4, len(right) // 2, len(right) - 2, len(right) - 1]
    ours = order_statistics.negative_order_statistics(x, labels, ranks, held)
    torch.testing.assert_close(torch.stack(ours), right[ranks], rtol=0, atol=0)


@pytest.mark.parametrize("deviations", [-1.0, 0.0, 5.0])
def test_order_statistics_where_the_sample_misleads(monkeypatch, deviations):
    monkeypatch.setattr(order_statistics, "_SAMPLE", 500)
    monkeypatch.setattr(order_statistics, "_DEVIATIONS", deviations)
    x = torch.randn(80, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(80) % 7
    s, _, negative = classes(x, labels, normalize=False)
    right = s[negative.triu(1)].sort().values
    ranks = [len(right) // 4, 3 * len(right) // 4]
    ours = order_statistics.negative_order_statistics(x, labels, ranks, 100)
    torch.testing.assert_close(torch.stack(ours), right[ranks])


def test_order_statistics_look_at_each_pair_once(monkeypatch):
    """The quartiles of many pairs are found in one pass."""
    passes = []
    blocks = order_statistics._blocks
    monkeypatch.setattr(order_statistics, "_blocks", lambda *args: passes.append(1) or blocks(*args))
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    order_statistics.negative_order_statistics(x, torch.arange(500) // 2, [30000, 90000], 1 << 15)
    assert len(passes) == 1


def test_order_statistics_without_numbers():
    x = torch.tensor([[float("nan")], [1.0], [2.0]])
    assert order_statistics.negative_order_statistics(x, torch.arange(3), [0])[0].isnan()
    with pytest.raises(ValueError, match="no negative"):
        order_statistics.negative_order_statistics(x[:1], torch.arange(1), [0])


def dense_opis(x, labels, false_accepts, thresholds):
    s, positive, negative = classes(x, labels)
    distance = (2 - 2 * s).clamp(min=0).sqrt()
    ordered = distance[negative].sort().values
    bounds = [ordered[int(share * (len(ordered) - 1))] for share in false_accepts]
    utilities = []
    for d in torch.linspace(float(bounds[0]), float(bounds[1]), thresholds, dtype=torch.float64):
        row = []
        for c in labels.unique():
            mine = labels == c
            if mine.sum() > 1:
                hit = (distance[mine][:, mine][positive[mine][:, mine]] <= d).double().mean()
                kept = (distance[mine][:, ~mine] > d).double().mean()
                row.append(2 * hit * kept / (hit + kept).clamp(min=1e-300))
        utilities.append(torch.stack(row))
    u = torch.stack(utilities)
    spread = (u - u.mean(1, keepdim=True)).square().mean(1)
    return torch.trapezoid(spread, dx=1 / (thresholds - 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_opis(seed):
    labels = torch.tensor([0] * 9 + [3] * 12 + [7] * 1 + [8] * 10)  # 7 has no pair
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x + F.one_hot(torch.tensor([0] * 9 + [1] * 12 + [2] + [3] * 10)) * 1.5
    ours = operating_point_inconsistency(x, labels, false_accepts=(0.05, 0.4), thresholds=31)
    right = dense_opis(x, labels, (0.05, 0.4), 31)
    assert float(right) > 1e-4
    # a distance of the grid may be that of a pair, to rounding: one pair of a class in or out
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=0)


def test_opis_bad_input():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="positive and negative pairs"):
        operating_point_inconsistency(x, torch.arange(4))
    with pytest.raises(ValueError, match="rising shares"):
        operating_point_inconsistency(x, torch.tensor([0, 0, 1, 1]), false_accepts=(0.2, 0.1))
