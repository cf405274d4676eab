"""binary_cross_entropy_with_logits and kl_div as drop-ins: transforms, second derivatives, what goes to torch, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import pointwise
from test_pointwise_loss import _C, KINDS, OPS, cpp, each_kind, operands, pytestmark  # noqa: F401  (a fixture, a mark)


@each_kind
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_and_transforms_are_torchs(kind: str, reduction: str) -> None:
    ours, torch_own, more = KINDS[kind]
    x, t = operands(kind, (3, 11), torch.float32)
    twice, found = [], []
    for f in (ours, torch_own):

        def loss(z: Tensor, y: Tensor = t, f: Callable[..., Tensor] = f) -> Tensor:
            return f(z, y, reduction=reduction, **more)

        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf).square().sum(), leaf, create_graph=True)
        twice.append((g.detach(), *torch.autograd.grad(g.square().sum(), leaf)))
        gradient = torch.func.grad(lambda z, loss=loss: loss(z).sum())(x)
        found.append((gradient, torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], torch.func.vmap(loss)(x, t)))
    for a, b in zip(*twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_batched_gradients() -> None:
    x, t = operands("bce", (3, 5), torch.float32)
    x.requires_grad_()
    loss = fastloss.functional.binary_cross_entropy_with_logits(x, t)
    (rows,) = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(rows, torch.stack((one, 2 * one)), rtol=1e-5, atol=1e-7)


def test_compile_is_torchs() -> None:
    x, t = operands("bce", (4, 9), torch.float32)
    f = fastloss.functional.binary_cross_entropy_with_logits
    assert torch.equal(
        torch.compile(f, backend="eager", fullgraph=True)(x, t), F.binary_cross_entropy_with_logits(x, t)
    )


def reaches(f: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    calls, run = [], fastloss.registry.run
    with monkeypatch.context() as m:
        m.setattr(fastloss.registry, "run", lambda op, *args: calls.append(op) or run(op, *args))
        f()
    return bool(calls)


@each_kind
def test_what_goes_to_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default small inputs; always float64, a trained target or weight, empty inputs and deprecated arguments."""
    ours, torch_own, more = KINDS[kind]
    x, t = operands(kind, (4, 5), torch.float32)
    trained = t.clone().requires_grad_()
    empty = torch.empty(0)
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((x.double(), t.double()), {}), ((x, trained), {}), ((empty, empty), {}), ((x, t), {"size_average": False}),
        ((x, t.double()), {}),
    ]  # fmt: skip
    if kind == "bce":
        cases += [((x, t, torch.ones(5).double()), {})]
    else:
        cases += [((x, t[:1]), {})]
    assert reaches(lambda: ours(x, t, **more), monkeypatch)
    for args, kwargs in cases:
        with pytest.warns() if "size_average" in kwargs else pytest.MonkeyPatch.context():
            assert not reaches(lambda args=args, kwargs=kwargs: ours(*args, **kwargs, **more), monkeypatch)
            a, b = (f(*args, **kwargs, **more) for f in (ours, torch_own))
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and a.dtype == b.dtype
    monkeypatch.setattr(fastloss.registry, "_forced", None)
    assert not reaches(lambda: ours(x, t, **more), monkeypatch)
    large = torch.zeros(pointwise.SMALL)
    assert reaches(lambda: ours(large, large, **more), monkeypatch) == (_C.best_isa() > 0)
    assert not reaches(lambda: ours(large, large, reduction="none", **more), monkeypatch)


def test_errors() -> None:
    """torch's types; messages name the shapes. The ops by themselves refuse what they would read out of bounds."""
    x = torch.zeros(3, 4)
    bce, kl = fastloss.functional.binary_cross_entropy_with_logits, fastloss.functional.kl_div
    with pytest.raises(ValueError, match=r"must be the same.*input: \(3, 4\)"):
        bce(x, x[:2])
    with pytest.raises(ValueError, match="average is not a valid value"):
        bce(x, x, reduction="average")
    with pytest.raises(RuntimeError, match=r"target: \(2, 4\)"):
        kl(x, x[:2])
    with pytest.raises(RuntimeError, match=r"weight: \(3,\)"):
        bce(x, x, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"weight: \(2, 3, 4\)"):
        bce(x, x, torch.ones(2, 3, 4))
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        bce(x, x, torch.ones(4).requires_grad_())
    with pytest.raises(fastloss.BackendError, match="must divide"):
        OPS.pointwise_loss(x, x, torch.ones(5))
    with pytest.raises(fastloss.BackendError, match="one label for each"):
        OPS.pointwise_loss(x, x[:2])
    with pytest.raises(fastloss.BackendError, match="contiguous"):
        OPS.pointwise_loss(x.T, x.T)
    with pytest.raises(fastloss.BackendError, match="1 or 12 numbers, got 3"):
        OPS.pointwise_loss_backward(torch.ones(3), x, x)
    assert OPS.pointwise_loss(x[:0], x[:0])[0] == 0


def test_modules_are_torchs_with_our_functions() -> None:
    x, t = operands("bce", (5, 6), torch.float32)
    weights = {"weight": torch.rand(6), "pos_weight": torch.rand(6)}
    ours, theirs = (m.BCEWithLogitsLoss(**weights, reduction="sum") for m in (fastloss.nn, torch.nn))
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    assert isinstance(ours, torch.nn.BCEWithLogitsLoss) and ours.state_dict().keys() == theirs.state_dict().keys()
    x, t = operands("kl_log", (5, 6), torch.float32)
    for args in ({"reduction": "batchmean", "log_target": True}, {"reduction": "none"}):
        ours, theirs = (m.KLDivLoss(**args) for m in (fastloss.nn, torch.nn))
        torch.testing.assert_close(ours(x, t), theirs(x, t), equal_nan=True)


def test_mean_of_kl_div_warns_as_in_torch() -> None:
    x, t = operands("kl", (3, 4), torch.float32)
    with pytest.warns(UserWarning, match="batchmean") as caught:
        fastloss.functional.kl_div(x, t)
    assert caught[0].filename == __file__
