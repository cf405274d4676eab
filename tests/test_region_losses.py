"""fastloss.region_stats and region_loss as users call them: what a region is, what counts, every loss, every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

import fastloss
from fastloss import losses
from region_formulas import ARGUMENTS, LOSSES

B, C, H, W = 3, 4, 5, 61  # 305 pixels: classes are regions of each sample, to be summed
DIMS = {"sample": (1, 2, 3), "class": (0, 2, 3), "sample_class": (2, 3), "batch": (0, 1, 2, 3)}
each_per = pytest.mark.parametrize("per", DIMS)
ALL = ("squared", "bce", "entropy")


def operands(dtype: torch.dtype = torch.float64, h: int = H) -> tuple[Tensor, Tensor]:
    return torch.randn(B, C, h, W, dtype=dtype, requires_grad=True), torch.rand(B, C, h, W) < 0.3


def sums(p: Tensor, t: Tensor, dims: tuple[int, ...], m: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    """I, S, Y, Q, N."""
    t = t.to(p.dtype)
    terms = (p * t, p, t, p * p, torch.ones_like(p))
    return tuple((m * term).sum(dims) for term in terms)


def agree(stats: fastloss.RegionStats, right: tuple[Tensor, ...]) -> None:
    ours = (stats.true_positive, stats.predicted, stats.labelled, stats.squared, stats.count)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-5, atol=1e-5)
    i, s, y, _, n = right
    torch.testing.assert_close(stats.true_negative, n - y - s + i, check_dtype=False, rtol=1e-4, atol=1e-4)


@each_per
@pytest.mark.parametrize("h", [H, 1], ids=["summed", "copied"])
def test_per(per: str, h: int) -> None:
    x, t = operands(torch.float32, h)
    channels_last = x.detach().contiguous(memory_format=torch.channels_last)
    for logits in (x, channels_last, x.detach().transpose(2, 3).contiguous().transpose(2, 3)):
        agree(fastloss.region_stats(logits, t, per=per, stats=ALL), sums(x.sigmoid(), t, DIMS[per]))
    one = fastloss.region_stats(x[:, 0], t[:, 0].float(), per="sample", stats="squared")
    agree(one, sums(x[:, 0].sigmoid(), t[:, 0], (1, 2)))


@each_per
@pytest.mark.parametrize("h", [H, 1], ids=["summed", "copied"])
def test_what_counts(per: str, h: int) -> None:
    """Masks of all shapes, an ignored value, NaN where nothing counts; the gradient there is 0."""
    x, t = operands(torch.float32, h)
    pixels = torch.rand(B, h, W) < 0.7
    full = pixels[:, None].expand_as(t)
    dirty = torch.where(full, x.detach(), torch.nan).requires_grad_()
    right = sums(x.sigmoid(), t, DIMS[per], full.float())
    ids = torch.randint(0, C, (B, h, W))
    for mask in (pixels, pixels[:, None].to(torch.uint8), full):
        stats = fastloss.region_stats(dirty, t, per=per, mask=mask, stats=ALL)
        agree(stats, right)
        (gradient,) = torch.autograd.grad(losses.dice(stats).sum() + stats.bce.sum() + stats.entropy.sum(), dirty)
        assert gradient[full].isfinite().all() and (gradient[~full] == 0).all() and gradient.any()
    marked = torch.where(full, t.to(torch.uint8), 255)
    for target in (marked, marked.long(), marked.float()):
        agree(fastloss.region_stats(dirty, target, per=per, ignore_index=255, stats=ALL), right)
    both = torch.where(torch.rand(B, h, W) < 0.5, ids, 255)
    stats = fastloss.region_stats(dirty, both, per=per, ignore_index=255, mask=pixels, stats=ALL)
    counted = (both != 255)[:, None] & full
    agree(stats, sums(x.sigmoid(), both[:, None] == torch.arange(C)[:, None, None], DIMS[per], counted.float()))


def test_one_dimension() -> None:
    """Binary classification: logits [N]."""
    x, t = torch.randn(9), torch.rand(9) < 0.4
    torch.testing.assert_close(fastloss.region_stats(x, t, per="batch").true_positive, (x.sigmoid() * t).sum())
    torch.testing.assert_close(fastloss.region_stats(x, t).predicted, x.sigmoid())


@each_per
def test_nothing_there(per: str) -> None:
    """No samples, no pixels, nothing that counts: numbers, never NaN, and losses of 0."""
    for shape in ((0, 2, 3), (2, 2, 0), (2, 0, 3)):
        x, t = torch.randn(shape, requires_grad=True), torch.zeros(shape, dtype=torch.bool)
        stats = fastloss.region_stats(x, t, per=per, stats=ALL)
        expected = {"sample": shape[:1], "class": shape[1:2], "sample_class": shape[:2], "batch": ()}[per]
        assert stats.shape == expected and not stats.table.any()
        losses.dice(stats).sum().backward()
        assert x.grad is not None and x.grad.shape == shape
    x, t = torch.full((2, 2, 300), torch.nan, requires_grad=True), torch.ones(2, 2, 300)
    for mask in (torch.zeros(2, 300, dtype=torch.bool), torch.zeros(2, 2, 300, dtype=torch.bool)):
        for name in LOSSES:
            if name == "proportion_kl" or "plain" in name or name == "f_beta":
                continue
            loss = getattr(losses, name.split(",")[0])(
                fastloss.region_stats(x, t, per=per, mask=mask, stats="squared"), **ARGUMENTS.get(name, {})
            )
            assert (loss == 0).all(), name
        total = fastloss.region_loss(x, t, losses.f_beta, per=per, mask=mask, reduction="sum")
        assert total == 0 and not torch.autograd.grad(total, x)[0].any()


@pytest.mark.parametrize("name", LOSSES)
@each_per
def test_losses(name: str, per: str) -> None:
    """Values and gradients in float64 against the published formula."""
    x, t = operands()
    loss: Callable[..., Tensor] = getattr(losses, name.split(",")[0])
    ours = loss(fastloss.region_stats(x, t, per=per, stats="squared"), **ARGUMENTS.get(name, {}))
    right = LOSSES[name](*sums(x.sigmoid(), t, DIMS[per]))
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
    weight = torch.rand_like(right)
    torch.testing.assert_close(
        *(torch.autograd.grad((weight * value).sum(), x)[0] for value in (ours, right)), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("name", ["f_beta", "g_mean", "balanced_accuracy"])
@pytest.mark.parametrize("sharpness", [2.0, 73.0])
def test_anyloss(name: str, sharpness: float) -> None:
    x, t = operands()
    ours = fastloss.region_loss(
        x, t, getattr(losses, name), sharpness=sharpness, per="batch", **ARGUMENTS.get(name, {})
    )
    right = LOSSES[name](*sums(torch.sigmoid(sharpness * (x.sigmoid() - 0.5)), t, DIMS["batch"]))
    torch.testing.assert_close(ours, right)
    gradients = [torch.autograd.grad(value, x)[0] for value in (ours, right)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-16)


def test_repri() -> None:
    x, t = operands()
    stats = fastloss.region_stats(x, t, per="sample_class", stats=("entropy", "bce"))
    p = x.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean((2, 3))
    prior = torch.rand(B, C, dtype=torch.float64)
    r = p.mean((2, 3))
    kl = r * (r / prior).log() + (1 - r) * ((1 - r) / (1 - prior)).log()
    ours = losses.repri(stats, prior=prior, kl_weight=2.0, entropy_weight=0.5)
    torch.testing.assert_close(ours, 2 * kl + 0.5 * entropy)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), x), torch.autograd.grad((2 * kl + 0.5 * entropy).sum(), x)
    )
    bce = F.binary_cross_entropy_with_logits(x, t.to(x.dtype), reduction="none").mean((2, 3))
    torch.testing.assert_close(losses.region_bce(stats), bce)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["nothing", "everything", "perfect", "wrong"])
def test_regions_of_one_kind(name: str, kind: str) -> None:
    """Values in [0, 1] where they should be, and a finite gradient, when all labels are alike or all logits saturated."""
    x = torch.randn(2, 1, 40, requires_grad=True)
    t = torch.zeros(2, 1, 40) if kind == "nothing" else torch.ones(2, 1, 40)
    if kind in ("perfect", "wrong"):
        t = (torch.rand(2, 1, 40) < 0.5).float()
        x = (torch.where(t > 0, 200.0, -200.0) * (1 if kind == "perfect" else -1)).requires_grad_()
    loss = getattr(losses, name.split(",")[0])
    value = loss(fastloss.region_stats(x, t, stats="squared"), **ARGUMENTS.get(name, {}))
    assert value.isfinite().all() and (value >= 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()
    if kind == "perfect" and name != "proportion_kl":
        assert (value <= 1e-5).all()
    if kind == "wrong" and name != "proportion_kl":
        assert (value >= 0.9).all()


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_activation(activation: str) -> None:
    x, _ = operands()
    ids = torch.randint(0, C, (B, H, W))
    p = x.softmax(1)
    if activation == "none":
        p = x.detach().sigmoid().requires_grad_()
        x = p
    ours = fastloss.region_loss(x, ids, losses.dice, activation=activation, per="class", form="squared")
    one_hot = F.one_hot(ids, C).movedim(-1, 1)
    right = LOSSES["dice, squared"](*sums(p, one_hot, DIMS["class"])).mean()
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(right, x))
    half = fastloss.region_loss(x.detach().bfloat16(), ids, losses.dice, activation=activation, per="class")
    assert half.dtype == torch.float32 and half.isfinite()


def test_modules() -> None:
    x, t = operands()
    modules = fastloss.nn
    pairs: list[tuple[torch.nn.Module, Callable[..., Tensor], dict[str, Any]]] = [
        (modules.DiceLoss("squared", per="class"), losses.dice, {"form": "squared", "per": "class"}),
        (modules.IoULoss(), losses.iou, {}),
        (modules.TverskyLoss(0.2, 0.8), losses.tversky, {"alpha": 0.2, "beta": 0.8}),
        (modules.TverskyLoss(gamma=0.5), losses.focal_tversky, {"gamma": 0.5}),
        (modules.AnyLoss("g_mean", 20.0), losses.g_mean, {"sharpness": 20.0, "per": "batch"}),
        (modules.RegionLoss(losses.mean_entropy), losses.mean_entropy, {}),
    ]
    for module, loss, arguments in pairs:
        assert torch.equal(module(x, t), fastloss.region_loss(x, t, loss, **arguments))
    assert "per='class'" in repr(pairs[0][0])
    mask = torch.rand(B, H, W) < 0.5
    assert torch.equal(modules.DiceLoss()(x, t, mask), fastloss.region_loss(x, t, losses.dice, mask=mask))


def test_reduction_leaves_empty_regions_out() -> None:
    x, t = operands(torch.float32)
    mask = torch.ones(B, H, W, dtype=torch.bool)
    mask[1] = False
    each = fastloss.region_loss(x, t, losses.dice, mask=mask, reduction="none")
    assert each.shape == (B,) and each[1] == 0
    torch.testing.assert_close(fastloss.region_loss(x, t, losses.dice, mask=mask), each.sum() / 2)
    torch.testing.assert_close(fastloss.region_loss(x, t, losses.dice, mask=mask, reduction="sum"), each.sum())


def loss_of(x: Tensor, t: Tensor) -> Tensor:
    stats = fastloss.region_stats(x, t, per="class", stats=ALL, mask=torch.ones(B, H, W, dtype=torch.bool))
    return (losses.dice(stats) + losses.dice(stats, form="squared")).mean() + stats.bce.mean() + stats.entropy.mean()


def test_transforms() -> None:
    """vmap of grad, jvp, second derivatives and a graph without breaks."""
    _, t = operands()
    xs = torch.randn(2, B, C, H, W)
    each = torch.stack([torch.autograd.grad(loss_of(x, t), x)[0] for x in (v.clone().requires_grad_() for v in xs)])
    torch.testing.assert_close(vmap(grad(lambda x: loss_of(x, t)))(xs), each, rtol=1e-4, atol=1e-6)
    tangent = torch.randn_like(xs[0])
    _, directional = jvp(lambda x: loss_of(x, t), (xs[0],), (tangent,))
    torch.testing.assert_close(directional, (each[0] * tangent).sum(), rtol=1e-4, atol=1e-4)
    x = xs[0].double().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(x, t), x, create_graph=True)
    (second,) = torch.autograd.grad((first * tangent).sum(), x)
    ahead, behind = (grad(lambda v: loss_of(v, t))(x.detach() + e * tangent) for e in (1e-5, -1e-5))
    torch.testing.assert_close(second, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)


def test_compile() -> None:
    ops: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    x, t = operands(torch.float32)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, t), x), torch.autograd.grad(loss_of(x, t), x))
    assert any("region_stats_backward" in op for op in ops), ops


def test_second_backward_is_bit_equal() -> None:
    x, t = operands(torch.float32)
    value = loss_of(x, t)
    assert torch.equal(*(torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2)))


X, T = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": T.long()}, TypeError, "floating dtype"),
    ({"logits": torch.tensor(1.0), "target": torch.tensor(1.0)}, ValueError, "batch dimension"),
    ({"per": "pixel"}, ValueError, "per must be one of"),
    ({"stats": ("accuracy",)}, ValueError, "unknown statistic"),
    ({"activation": "tanh"}, ValueError, "activation must be one of"),
    ({"activation": "none", "stats": "bce"}, ValueError, "need logits"),
    ({"sharpness": 0.0}, ValueError, "sharpness must be"),
    ({"sharpness": float("inf")}, ValueError, "sharpness must be"),
    ({"target": torch.zeros(2, 3, 5)}, ValueError, "shape of the logits"),
    ({"target": torch.zeros(2, 4)}, ValueError, "class ids"),
    ({"target": T.to(torch.complex64)}, TypeError, "complex"),
    ({"target": T.clone().requires_grad_()}, ValueError, "not computed"),
    ({"target": torch.full((2, 3, 4), 2)}, ValueError, "target 2 is out of bounds"),
    ({"target": torch.full((2, 4), 3)}, IndexError, "target 3 is out of bounds"),
    ({"target": torch.full((2, 4), -1), "ignore_index": 255}, IndexError, "or ignore_index 255"),
    ({"mask": T}, TypeError, "mask must be"),
    ({"mask": T[:, 0, :3] > 0}, ValueError, "that of the pixels"),
    ({"logits": torch.zeros(3), "target": torch.zeros(3), "activation": "softmax"}, ValueError, "needs logits"),
]


@pytest.mark.parametrize("change, error, words", BAD, ids=[f"{e.__name__}: {w}" for _, e, w in BAD])
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastloss.region_stats(**{"logits": X, "target": T, **change})


def test_refusals_of_losses() -> None:
    stats = fastloss.region_stats(X, T)
    for call, words in (
        (lambda: losses.dice(stats, form="cubic"), "form must be one of"),
        (lambda: losses.dice(stats, smooth=-1), "smooth must be >= 0"),
        (lambda: losses.dice(stats, form="squared"), "pass 'squared'"),
        (lambda: losses.iou(stats, eps=-1), "eps must be"),
        (lambda: losses.tversky(stats, alpha=-1), "alpha must be"),
        (lambda: losses.proportion_kl(stats, prior=1.0), "prior must be in"),
        (lambda: stats.bce, "pass 'bce'"),
        (lambda: stats.entropy, "pass 'entropy'"),
        (lambda: fastloss.nn.AnyLoss("auc"), "metric must be one of"),
        (lambda: fastloss.region_loss(X, T, lambda s: s.count.sum()), "one value a region"),
        (lambda: fastloss.region_loss(X, T, losses.dice, reduction="max"), "reduction must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="unknown arguments smoth"):
        fastloss.nn.DiceLoss(smoth=1.0)
