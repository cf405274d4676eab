"""SuSana's losses against loops over samples."""

from __future__ import annotations

import pytest
import torch

from dense_losses import check_same, embeddings
from fastloss.contrastive import icnn_loss, icnn_score, proto_triplet_loss


def distance(a, b):
    return ((a - b).square().sum() + 1e-6).sqrt()


def test_proto_triplet():
    queries, prototypes = embeddings(12, 3)[0], embeddings(4, 3, seed=1)[0]
    labels, own = torch.arange(12) % 4, torch.tensor([3, 1, 0, 2])

    def dense(q, p):
        rows = []
        for x, label in zip(q, labels, strict=True):
            d = [distance(x, c) for c in p]
            near = min(d[i] for i in range(4) if own[i] != label)
            rows.append((next(d[i] for i in range(4) if own[i] == label) - near + 0.5).relu())
        return torch.stack(rows)

    check_same(lambda q, p: proto_triplet_loss(q, labels, p, own, reduction="none"), dense, [queries, prototypes])


def test_proto_triplet_of_unknown_classes():
    queries, prototypes = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    loss = proto_triplet_loss(queries, torch.tensor([0, 5, 1]), prototypes, torch.tensor([0, 1]))
    gradient = torch.autograd.grad(loss, queries)[0]
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[1] == 0).all()
    with pytest.raises(ValueError, match="one D"):
        proto_triplet_loss(queries, torch.arange(3), prototypes[:, :2], torch.arange(2))


def loop_score(x, labels, k, looked_at):
    eps, n = 1e-7, len(x)
    same_means, other_means, counts, others = [], [], [], []
    for i in range(n):
        near = sorted(((distance(x[i], x[j]), j) for j in range(n) if j != i), key=lambda pair: float(pair[0]))
        near = near[:looked_at]
        enemies = [d for d, j in near if labels[j] != labels[i]]
        reference = enemies[0] if enemies else torch.tensor(float("inf"))
        scaled = [d / (reference + eps) for d, _ in near[:k]]
        top = max([s.clamp(min=1) for s in scaled], key=float)
        same = [s / top for s, (_, j) in zip(scaled, near, strict=False) if labels[j] == labels[i]]
        counts.append(len(same))
        if same:
            same_means.append(sum(same) / (len(same) + eps))
        others.append([d for d, j in near[:k] if labels[j] != labels[i]])
    flat = [d for row in others for d in row]
    compact = 1 - (sum(same_means) / (len(same_means) + eps) if same_means else 0.0)
    apart = torch.zeros((), dtype=x.dtype)
    if flat:
        most = max(flat, key=float) + eps
        other_means = [sum(d / most for d in row) / (len(row) + eps) for row in others if row]
        apart = sum(other_means) / (len(other_means) + eps)
    else:
        apart = apart + 1
    gamma = sum(counts) / (k * n) if k + 2 < n else 1.0
    return ((compact + apart) / 2 + gamma) / 2


@pytest.mark.parametrize("looked_at", [None, 7, 13])
@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])  # 30: all neighbours are of one class
def test_icnn(spread, looked_at):
    labels = torch.arange(15) % 3
    offset = spread * torch.nn.functional.one_hot(labels, 5).double()
    (x,) = embeddings(15, 5, count=1)
    k = 4
    check_same(
        lambda x: icnn_loss(x + offset, labels, neighbours=k, looked_at=looked_at),
        lambda x: -loop_score(x + offset, labels, k, looked_at or 5).log(),
        [x],
    )


def test_icnn_of_few_samples():
    labels = torch.tensor([0, 0, 1, 1, 2])
    (x,) = embeddings(5, 3, count=1)
    check_same(lambda x: icnn_score(x, labels), lambda x: loop_score(x, labels, 3, 4), [x])
    with pytest.raises(ValueError, match="three samples"):
        icnn_loss(x[:2], labels[:2])
    with pytest.raises(ValueError, match="neighbours"):
        icnn_loss(x, labels, neighbours=0)
