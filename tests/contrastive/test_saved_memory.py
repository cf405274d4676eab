"""No loss saves a number a pair for its backward; and the modules call their functions."""

from __future__ import annotations

import pytest
import torch

from fastloss import SameId
from fastloss import contrastive as c

BATCH, WIDTH = 300, 8


def pieces():
    x, y, z = torch.randn(3, BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    labels = torch.arange(BATCH) % 10
    permutation, share = c.draw_mixture(BATCH)
    eye = torch.eye(WIDTH, requires_grad=True)
    edges = torch.arange(BATCH)
    return {
        "siglip": lambda: c.siglip_loss(x, y, 10.0, -10.0, normalize=True),
        "clipn": lambda: c.clipn_loss(x, y, z, 10.0, normalize=True),
        "mw query": lambda: c.mw_loss(x, y),
        "mw pooled": lambda: c.mw_loss(x, y, mode="pooled", bins=128),
        "mw labels": lambda: c.mw_loss(x, y, mode="pooled", bins=128, positive=SameId(labels, labels)),
        "contrastive": lambda: c.contrastive_loss(x, labels),
        "tcm": lambda: c.tcm_loss(x, labels),
        "unpg": lambda: c.unpg_loss(x, y[:10], labels),
        "koleo": lambda: c.info_nce_koleo_loss(x, y),
        "mixup": lambda: c.mixup_info_nce_loss(x, y, permutation, share),
        "metrix": lambda: c.metrix_loss(x, y, z, 0.3),
        "pamc": lambda: c.pamc_loss(x, edges, edges.flip(0), torch.ones(BATCH), labels, 10),
        "distill": lambda: c.distill_clip_loss(x, y, y, z, 5.0, 5.0),
        "soft": lambda: c.soft_clip_loss(x, y, detach=False),
        "swalip": lambda: c.swalip_loss((x, y), (y, z), 10.0),
        "bilinear": lambda: c.bilinear_info_nce_loss(x, y, eye),
        "glocal": lambda: c.glocal_alignment_loss(x[None], y[None]),
        "views": lambda: c.view_contrast_loss((x, y, z)),
        "wpc": lambda: c.wpc_loss(torch.tanh, torch.tanh, x, y, penalty_weight=1.0),
        "gram": lambda: c.cyclip_loss(x, y) + c.vicreg_loss(x, y) + c.gor_loss(x, y) + c.barlow_twins_loss(x, y),
        "spectral": lambda: c.spectral_contrastive_loss(x, y),
    }


@pytest.mark.parametrize("name", sorted(pieces()))
def test_nothing_squared_is_saved(name):
    saved = []

    def look(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = pieces()[name]()
    assert saved and max(saved) < BATCH * BATCH // 4
    loss.backward()


MODULES = [
    (c.ContrastiveLoss(), c.contrastive_loss, 1, True),
    (c.TCMLoss(), c.tcm_loss, 1, True),
    (c.MWLoss(2.0, mode="pooled", bins=64), lambda q, k: c.mw_loss(q, k, 2.0, mode="pooled", bins=64), 2, False),
    (c.KoLeoLoss(), c.koleo_loss, 1, False),
    (c.SoftClipLoss(), c.soft_clip_loss, 2, False),
    (c.MetrixLoss(weight=0.3), lambda a, p, n: c.metrix_loss(a, p, n, 0.5, weight=0.3), 3, False),
    (c.CyCLIPLoss(), c.cyclip_loss, 2, False),
    (c.BarlowTwinsLoss(), c.barlow_twins_loss, 2, False),
    (c.VICRegLoss(), c.vicreg_loss, 2, False),
]


@pytest.mark.parametrize(("module", "function", "count", "labelled"), MODULES)
def test_modules(module, function, count, labelled):
    inputs = list(torch.randn(count, 9, 4, generator=torch.Generator().manual_seed(0)))
    inputs += [torch.arange(9) % 3] if labelled else []
    more = [0.5] if isinstance(module, c.MetrixLoss) else []
    assert torch.equal(module(*inputs, *more), function(*inputs))
    assert type(module).__name__ in repr(module)


def test_m3col_changes_over():
    loss = c.M3CoLLoss()
    q, k = torch.randn(2, 6, 4)
    permutation, share = c.draw_mixture(6)
    assert loss.mixes(0.2) and not loss.mixes(0.33)
    assert torch.equal(loss(q, k, 0.2, permutation, share), c.mixup_info_nce_loss(q, k, permutation, share))
    assert torch.equal(loss(q, k, 0.9), c.soft_clip_loss(q, k))
    with pytest.raises(ValueError, match="pass permutation and share"):
        loss(q, k, 0.1)
    with pytest.raises(ValueError, match="mixup_share"):
        c.M3CoLLoss(mixup_share=2.0)
