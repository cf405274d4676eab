"""SupCon, Core-tuning's focal SupCon and mixtures, CompA's modular loss against their dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_checks import NEG, agree, agree_in, cosines, leaves
from fastloss.contrastive import (
    FocalSupConLoss,
    ModularContrastiveLoss,
    SupConLoss,
    focal_supcon_loss,
    mix_hard_pairs,
    modular_contrastive_loss,
    supcon_loss,
)

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, 2, 0])  # 3 stands alone


def dense_supcon(x, labels, keys=None, key_labels=None, temperature=0.07, mode="out"):
    """One value a row; rows without positives are 0."""
    own = keys is None
    keys, key_labels = (x, labels) if own else (keys, key_labels)
    z = cosines(x, keys) / temperature
    positive = labels[:, None] == key_labels[None]
    if own:
        z = z.masked_fill(torch.eye(len(x), dtype=torch.bool), NEG)
        positive = positive & ~torch.eye(len(x), dtype=torch.bool)
    count, some = positive.sum(1), positive.any(1)
    log_p = (z - torch.logsumexp(z, 1, keepdim=True))[some]
    positive, count = positive[some], count[some]
    if mode == "out":
        values = -torch.where(positive, log_p, 0.0).sum(1) / count
    else:
        values = -torch.logsumexp(log_p.masked_fill(~positive, NEG), 1)
        values = values + count.double().log() if mode == "in" else values
    return torch.zeros(len(x), dtype=x.dtype).index_put((some.nonzero()[:, 0],), values), some


@pytest.mark.parametrize("mode", ["out", "in", "mil_nce"])
@pytest.mark.parametrize("keys", [False, True])
def test_supcon(mode, keys):
    x, k = leaves((10, 8), (13, 8))
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    given = {"keys": k, "key_labels": torch.arange(13) % 3} if keys else {}
    right, some = dense_supcon(x, LABELS, temperature=tau, mode=mode, **given)
    inputs = (x, tau, k) if keys else (x, tau)
    for reduction, value in (
        ("none", right), ("mean", right.mean()), ("mean_valid", right.sum() / some.sum()), ("sum", right.sum()),
    ):  # fmt: skip
        ours = supcon_loss(x, LABELS, temperature=tau, mode=mode, reduction=reduction, **given)
        agree(ours, value, inputs)
    scaled = supcon_loss(x, LABELS, temperature=tau, mode=mode, base_temperature=0.07, reduction="none", **given)
    agree(scaled, right * tau / 0.07, inputs)


@pytest.mark.parametrize("mode", ["out", "in"])
def test_supcon_without_any_positive(mode):
    x = torch.randn(4, 8, requires_grad=True)
    for reduction in ("mean", "mean_valid"):
        loss = supcon_loss(x, torch.arange(4), mode=mode, reduction=reduction)
        assert loss == 0 and torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_supcon_without_any_negative():
    (x,) = leaves((4, 8))
    labels = torch.zeros(4, dtype=torch.int64)
    agree(supcon_loss(x, labels), dense_supcon(x, labels)[0].mean(), (x,))


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_supcon_of_duplicates_at_all_scales(temperature):
    (x,) = leaves((10, 8))
    with torch.no_grad():
        x[2], x[7] = x[0], x[0]
    agree(
        supcon_loss(x, LABELS, temperature=temperature, reduction="none"),
        dense_supcon(x, LABELS, temperature=temperature)[0], (x,),
    )  # fmt: skip


def test_supcon_in_low_precision():
    (x,) = leaves((40, 16))
    labels = torch.arange(40) % 7
    for dtype in (torch.float32, torch.bfloat16):
        agree_in(
            dtype, lambda x: supcon_loss(x, labels, temperature=0.2),
            lambda x: dense_supcon(x, labels, temperature=0.2)[0].mean(), (x,),
        )  # fmt: skip


def dense_focal(x, labels, temperature, divide_by):
    z = (cosines(x, x) / temperature).masked_fill(torch.eye(len(x), dtype=torch.bool), NEG)
    log_p = torch.log_softmax(z, 1)
    positive = (labels[:, None] == labels[None]) & ~torch.eye(len(x), dtype=torch.bool)
    terms = torch.where(positive, -(1 - log_p.exp()) * torch.where(positive, log_p, 0.0), 0.0).sum(1)
    count = positive.sum(1)
    return terms / (len(x) if divide_by == "batch" else count.clamp(min=1)), count > 0


@pytest.mark.parametrize("divide_by", ["batch", "positives"])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
def test_focal_supcon(divide_by, temperature):
    (x,) = leaves((10, 8))
    right, some = dense_focal(x, LABELS, temperature, divide_by)
    ours = focal_supcon_loss(x, LABELS, temperature, divide_by=divide_by)
    agree(ours, right.sum() / some.sum(), (x,))
    agree(FocalSupConLoss(temperature, divide_by=divide_by)(x, LABELS, reduction="none"), right, (x,))


def test_focal_supcon_of_one_class_and_of_none():
    (x,) = leaves((5, 8))
    labels = torch.zeros(5, dtype=torch.int64)
    agree(focal_supcon_loss(x, labels), dense_focal(x, labels, 0.07, "batch")[0].mean(), (x,))
    loss = focal_supcon_loss(x, torch.arange(5))
    assert loss == 0 and torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_focal_supcon_in_float32():
    (x,) = leaves((40, 16))
    labels = torch.arange(40) % 7
    agree_in(
        torch.float32, lambda x: focal_supcon_loss(x, labels, 0.2, divide_by="positives"),
        lambda x: dense_focal(x, labels, 0.2, "positives")[0].mean(), (x,), k=16,
    )  # fmt: skip


def test_hard_pairs():
    (x,) = leaves((10, 8))
    mixed = mix_hard_pairs(x, LABELS, generator=torch.Generator().manual_seed(1))
    s = cosines(x, x)
    same = LABELS[:, None] == LABELS[None]
    positive, negative = same & ~torch.eye(10, dtype=torch.bool), ~same
    farthest = torch.where(positive.any(1), s.masked_fill(~positive, torch.inf).argmin(1), torch.arange(10))
    nearest = s.masked_fill(~negative, NEG).argmax(1)
    assert torch.equal(mixed.first[10:], farthest) and torch.equal(mixed.second[10:], nearest)
    assert torch.equal(mixed.second[:10], torch.arange(10)) and mixed.first[:10].sort().values.equal(torch.arange(10))
    assert (mixed.share[:10] >= 0.8).all() and ((mixed.share >= 0) & (mixed.share <= 1)).all()
    share = mixed.share[:, None]
    agree(mixed.features, share * x[mixed.first] + (1 - share) * x[mixed.second], (x,))


def dense_modular(audio, positives, owner, scale, negatives=None, negative_owner=None):
    b = len(audio)
    rows = torch.arange(b)
    texts, owners, kind = positives, owner, torch.ones(len(positives), dtype=torch.bool)
    if negatives is not None:
        texts, owners = torch.cat((positives, negatives)), torch.cat((owner, negative_owner))
        kind = torch.cat((kind, torch.zeros(len(negatives), dtype=torch.bool)))
    z = scale * cosines(audio, texts)
    mine = rows[:, None] == owners[None]
    log_p = torch.log_softmax(z.masked_fill(~kind & ~mine, NEG), 1)
    positive = mine & kind
    some = positive.any(1)
    audios = (-torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1).clamp(min=1))[some]
    words = F.cross_entropy((scale * cosines(positives, audio)), owner)
    return (audios.mean() + words) / 2


@pytest.mark.parametrize("hard", [False, True])
def test_modular(hard):
    audio, positives, negatives = leaves((5, 8), (9, 8), (7, 8))
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([0, 1, 1, 2, 0, 4, 4, 4, 2])  # audio 3 has no text
    given = {"negatives": negatives, "negative_owner": torch.tensor([0, 0, 1, 3, 4, 4, 2])} if hard else {}
    ours = modular_contrastive_loss(audio, positives, owner, scale, **given)
    inputs = (audio, positives, scale, negatives) if hard else (audio, positives, scale)
    agree(ours, dense_modular(audio, positives, owner, scale, **given), inputs)


def test_modular_module_trains_its_scale():
    audio, positives, negatives = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    criterion = ModularContrastiveLoss()
    criterion(audio, positives, torch.arange(4), negatives, torch.arange(4)).backward()
    assert criterion.log_scale.grad is not None and criterion.log_scale.grad.abs() > 0


def test_modules_hold_their_options():
    (x,) = leaves((10, 8))
    assert torch.equal(SupConLoss()(x, LABELS), supcon_loss(x, LABELS, temperature=0.07, mode="out"))


def test_bad_input():
    x = torch.randn(10, 8)
    for call, message in (
        (lambda: supcon_loss(x, LABELS[:9]), "ids must have shape"),
        (lambda: supcon_loss(x, LABELS, temperature=-1.0), "temperature must be"),
        (lambda: supcon_loss(x, LABELS, base_temperature=0.0), "base_temperature must be"),
        (lambda: supcon_loss(x, LABELS, mode="both"), "mode must be"),
        (lambda: supcon_loss(x, LABELS, x), "come together"),
        (lambda: focal_supcon_loss(x, LABELS[:3]), "ids must have shape"),
        (lambda: focal_supcon_loss(x, LABELS, 0.0), "temperature must be"),
        (lambda: focal_supcon_loss(x, LABELS, divide_by="rows"), "divide_by must be"),
        (lambda: mix_hard_pairs(x, LABELS, least_share=2.0), "least_share must be"),
        (lambda: modular_contrastive_loss(x, x, LABELS, 0.0), "scale must be"),
        (lambda: modular_contrastive_loss(x, x, LABELS, 1.0, negatives=x), "come together"),
        (lambda: modular_contrastive_loss(x, x, LABELS, 1.0, reduction="none"), "not one list"),
        (lambda: modular_contrastive_loss(x, x, LABELS[:3], 1.0), "owner must have shape"),
        (lambda: ModularContrastiveLoss(200.0), "init_scale must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="integers"):
        supcon_loss(x, torch.randn(10))
    with pytest.raises(IndexError):
        modular_contrastive_loss(x, x, LABELS, 1.0, negatives=x, negative_owner=torch.full((10,), 99))


def test_modular_owners_are_checked():
    audio, texts, owner = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    for wrong in (owner + 1, owner - 1):
        with pytest.raises(IndexError, match=r"^owner must be in \[0, 3\), got ids from"):
            modular_contrastive_loss(audio, texts, wrong, 10.0)
        with pytest.raises(IndexError, match=r"negative_owner must be in \[0, 3\), got ids from"):
            modular_contrastive_loss(audio, texts, owner, 10.0, negatives=texts, negative_owner=wrong)
    with pytest.raises(ValueError, match=r"owner must have shape \[5\], got \[4\]"):
        modular_contrastive_loss(audio, texts, owner[:4], 10.0)
    with pytest.raises(TypeError, match="owner must be integers"):
        modular_contrastive_loss(audio, texts, owner.float(), 10.0)
