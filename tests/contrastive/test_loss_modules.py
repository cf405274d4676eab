"""Modules are their functions with the options fixed: same numbers, a repr, and copies that agree."""

from __future__ import annotations

import copy

import pytest
import torch

from fastloss import contrastive as c

G = torch.Generator().manual_seed(0)
Q, K, V, W = torch.randn(4, 9, 4, generator=G)
LABELS = torch.arange(9) % 3
EDGES = (torch.arange(9), torch.arange(9).flip(0), torch.ones(9))
HEAD, OLD_HEAD = torch.randn(2, 3, 4, generator=G)
GUIDE = c.GuideEmbeddings(V, W)
ENCODER = torch.nn.Linear(4, 3)
FIXED = {"share": torch.full((9,), 0.3), "permutation": torch.arange(9).flip(0)}


def case(module, function, *inputs, **options):
    return pytest.param(module, function, inputs, options, id=type(module).__name__)


@pytest.mark.parametrize(
    ("module", "function", "inputs", "options"),
    [
        case(c.HardQuantileLoss(0.2, fraction=0.5), c.hard_quantile_loss, Q, K, temperature=0.2, fraction=0.5),
        case(c.NPairsLoss(norm_weight=0.1), c.n_pairs_loss, Q, K, norm_weight=0.1),
        case(c.GISTEmbedLoss(0.1, contrast_anchors=False), c.gist_embed_loss, Q, K, GUIDE, temperature=0.1,
             contrast_anchors=False),
        case(c.PamCLoss(tau=2.0), c.pamc_loss, Q, *EDGES, LABELS, 3, tau=2.0),
        case(c.ProtoTripletLoss(margin=0.2), c.proto_triplet_loss, Q, LABELS, K[:3], torch.arange(3), margin=0.2),
        case(c.ICNNLoss(neighbours=2), c.icnn_loss, Q, LABELS, neighbours=2),
        case(c.GlocalAlignmentLoss(softmax="targets"), c.glocal_alignment_loss, Q[None], K[None], softmax="targets"),
        case(c.SiamLIPLoss(), c.siamlip_loss, Q, K, V, W),
        case(c.BCTLoss(compatibility=2.0), c.bct_loss, Q, HEAD, LABELS, OLD_HEAD, compatibility=2.0),
        case(c.BT2Loss(old_cosine=2.0), c.bt2_loss, Q, HEAD, LABELS, K, OLD_HEAD, V, W, Q, old_cosine=2.0),
        case(c.RMTLoss(contrast_weight=0.5), c.rmt_loss, Q, K, V, (Q, K, W), contrast_weight=0.5),
        case(c.BlockRankLoss(scale=10.0), c.blockrank_loss, Q, K > 0, scale=10.0),
        case(c.AR2RetrieverLoss(temperature=2.0), c.ar2_retriever_loss, Q, K, temperature=2.0),
        case(c.CLIPNLoss(5.0, normalize=True), c.clipn_loss, Q, K, V, scale=5.0, normalize=True),
        case(c.SpectralContrastiveLoss(normalize=True), c.spectral_contrastive_loss, Q, K, normalize=True),
        case(c.GORLoss(normalize=False), c.gor_loss, Q, K, normalize=False),
        case(c.DistillClipLoss(5.0, 7.0), c.distill_clip_loss, Q, K, V, W, scale=5.0, teacher_scale=7.0),
        case(c.SwALIPLoss(5.0, epsilon=0.1), c.swalip_loss, (Q, K), (V, W), scale=5.0, epsilon=0.1),
        case(c.HCLLoss(normalize=False, reduction="sum"), c.hcl_loss, Q, K, normalize=False, reduction="sum"),
        case(c.DualTemperatureLoss(normalize=False, reduction="none"), c.dual_temperature_loss, Q, K, normalize=False,
             reduction="none"),
    ],
)  # fmt: skip
def test_module_is_its_function(module, function, inputs, options):
    right = function(*inputs, **options)
    for loss in (module, copy.deepcopy(module)):
        torch.testing.assert_close(loss(*inputs), right, rtol=0, atol=0)
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    assert type(module).__name__ in repr(module)


@pytest.mark.parametrize("name", ["HardQuantileLoss", "NPairsLoss", "PamCLoss", "RMTLoss", "BT2Loss", "GORLoss"])
def test_published_values_are_the_defaults(name):
    module = getattr(c, name)()
    names = module.function.__kwdefaults__ or {}
    assert all(module.options[key] == value for key, value in names.items() if key in module.options)


def test_wpc():
    loss = c.WPCLoss(ENCODER, torch.nn.Tanh(), penalty_weight=0.5)
    right = c.wpc_loss(ENCODER, torch.tanh, Q, K[:, :3], penalty_weight=0.5, **FIXED)
    for module in (loss, copy.deepcopy(loss)):
        torch.testing.assert_close(module(Q, K[:, :3], **FIXED), right)
    assert len(list(loss.parameters())) == 2 and "penalty_weight=0.5" in repr(loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.HardQuantileLoss(0.0), "temperature must be"),
        (lambda: c.HardQuantileLoss(fraction=2.0), "fraction must be"),
        (lambda: c.NPairsLoss(norm_weight=-1.0), "norm_weight must be"),
        (lambda: c.GISTEmbedLoss(-1.0), "temperature must be"),
        (lambda: c.CLIPNLoss(0.0), "scale must be"),
        (lambda: c.DistillClipLoss(1.0, -1.0), "teacher_scale must be"),
        (lambda: c.AR2RetrieverLoss(adversarial_weight=2.0), "adversarial_weight must be"),
        (lambda: c.HCLLoss(reduction="max"), "reduction must be"),
        (lambda: c.DualTemperatureLoss(reduction="max"), "reduction must be"),
        (lambda: c.WPCLoss(torch.tanh, torch.tanh, penalty_weight=-1.0), "penalty_weight must be"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
