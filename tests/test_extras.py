"""What torch does not have: the keyword-only extras of the losses, the rows engine's checks, kept memory, the environment.

Every extra is held against one explicit formula in plain PyTorch, value and gradient under a random cotangent.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss import RowStats, compiled
from tolerance import check_close, check_gradient

B, T, D, V = 2, 4, 6, 19
IGNORED = 7  # in uint8's range too
DRAWN = torch.linspace(-1.0, 1.0, 4096).sin() * 7  # cotangents: the same numbers whoever asks


# ------------------------------------------------------------------------------------------------- the formula


def formula(
    z: Tensor, y: Tensor, *, reduction: str = "mean", weight: Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0, shift: bool = False,
    returns: tuple[str, ...] = (), ignore_index: int = IGNORED, **_: Any,
) -> Any:  # fmt: skip
    """Logits [..., V], the classes last; targets [...] or probabilities [..., V]. Nothing clever."""
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    vocab, soft = z.shape[-1], y.shape == z.shape
    w = torch.ones(vocab, dtype=z.dtype) if weight is None else weight.to(z.dtype)
    if shift:
        y = torch.cat((y[..., 1:].long(), torch.full((*y.shape[:-1], 1), ignore_index)), -1)
    valid = torch.ones(z.shape[:-1], dtype=torch.bool) if soft else y != ignore_index
    q = y.to(z.dtype) if soft else F.one_hot(torch.where(valid, y, 0).long(), vocab).to(z.dtype)
    count = valid.sum() if soft else (q @ w * valid).sum()
    q = (1 - label_smoothing) * q + label_smoothing / vocab
    lse = torch.logsumexp(z, -1)
    logp = z - lse[..., None]
    loss = (-(q * w * logp).sum(-1) + z_loss * lse**2) * valid
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.sum() / count
    numbers = {"lse": lse * valid, "entropy": -(logp.exp() * logp).sum(-1) * valid}
    if not soft:
        numbers["accuracy"] = ((z.argmax(-1) == y) & valid).to(z.dtype)
    return (loss, {k: numbers[k] for k in returns}) if returns else loss


def scalar(out: Any) -> Tensor:
    """Everything differentiable that a call returned, under fixed cotangents."""
    loss, extras = out if isinstance(out, tuple) else (out, {})
    total = torch.zeros((), dtype=torch.promote_types(loss.dtype, torch.float32))
    for t in (loss, *(extras[k] for k in sorted(extras) if k != "accuracy")):
        total = total + (t.to(total.dtype) * DRAWN[: t.numel()].to(total.dtype).reshape(t.shape)).sum()
    return total


def operands(kind: str, target: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """([logits [B, T, V]] or [x, weight, bias], targets with some ignored rows)."""
    leaves = (
        [torch.randn(B, T, V) * 2] if kind == "logits" else [torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)]
    )
    y = torch.randint(0, V, (B, T))
    y[0, 1] = y[1, T - 1] = IGNORED
    if target == "probabilities":
        y = torch.rand(B, T, V).softmax(-1).to(dtype)
    return [t.to(dtype).requires_grad_() for t in leaves], y


def call(kind: str, leaves: list[Tensor], y: Tensor, ignore_index: int = IGNORED, **extras: Any) -> Any:
    """Ours, with the classes where each function wants them."""
    soft = y.is_floating_point()
    if kind == "logits":
        (z,) = leaves
        ignore = {} if soft else {"ignore_index": ignore_index}
        return fastloss.cross_entropy(z.movedim(-1, 1), y.movedim(-1, 1) if soft else y, **ignore, **extras)
    x, w, *bias = leaves
    ignore = {"ignore_index": None if soft else ignore_index}
    return fastloss.linear_cross_entropy(x, w, y, linear_bias=bias[0] if bias else None, **ignore, **extras)


def logits_of(kind: str, leaves: list[Tensor]) -> Tensor:
    return leaves[0] if kind == "logits" else F.linear(*leaves)


def wide(leaves: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]


def compare(kind: str, leaves: list[Tensor], y: Tensor, **extras: Any) -> None:
    """Ours against the formula in float64: value, what `returns` gives, and gradients."""
    dtype, exact = leaves[0].dtype, wide(leaves)
    ours = call(kind, leaves, y, **extras)
    truth = formula(logits_of(kind, exact), y.double() if y.is_floating_point() else y, **extras)
    plain = formula(logits_of(kind, leaves), y, **extras) if dtype.itemsize == 2 else truth
    assert isinstance(ours, tuple) == bool(extras.get("returns"))
    for a, b, r in zip(values(ours), values(plain), values(truth), strict=True):
        assert a.shape == r.shape
        check_close(*(t.reshape(1, -1) for t in (a, b, r)), dtype, ROUNDINGS[dtype])
    expected = torch.autograd.grad(scalar(truth), exact)
    gradients_agree(
        torch.autograd.grad(scalar(ours), leaves),
        expected if plain is truth else torch.autograd.grad(scalar(plain), leaves), expected,
    )  # fmt: skip


#: Units of rounding allowed; in 32 and 64 bits no composition of the same dtype is there to compare with.
ROUNDINGS = {torch.float64: 1e3, torch.float32: 64.0, torch.bfloat16: 8.0, torch.float16: 4.0}


def gradients_agree(ours: Iterable[Tensor], plain: Iterable[Tensor], truth: Iterable[Tensor]) -> None:
    """Row by row; a gradient of one dimension is one row, whose scale is that of its largest entry."""
    for a, b, r in zip(ours, plain, truth, strict=True):
        assert a.shape == r.shape
        check_gradient(*(t.reshape(1, -1) if t.dim() == 1 else t for t in (a, b, r)), a.dtype, ROUNDINGS[a.dtype])


def values(out: Any) -> list[Tensor]:
    return [out[0], *(out[1][k] for k in sorted(out[1]))] if isinstance(out, tuple) else [out]


EXTRAS: dict[str, dict[str, Any]] = {
    "z_loss": dict(z_loss=0.3),
    "softcap": dict(softcap=2.5),
    "logit_scale": dict(logit_scale=0.4),
    "scale and cap": dict(logit_scale=0.7, softcap=3.0),
    "shift": dict(shift=True),
    "returns": dict(returns=("lse", "accuracy", "entropy")),
    "returns one": dict(returns=("entropy",)),
    "weight": dict(weight=torch.linspace(0.2, 2.0, V), z_loss=0.2),
    "all": dict(
        z_loss=0.1, softcap=4.0, logit_scale=0.8, shift=True, returns=("lse", "accuracy", "entropy"),
        weight=torch.linspace(0.2, 2.0, V), label_smoothing=0.2,
    ),
}  # fmt: skip
TARGETS, KINDS, REDUCTIONS = ("ids", "probabilities"), ("logits", "linear"), ("mean", "sum", "none")


def fitted(name: str, target: str, dtype: torch.dtype) -> dict[str, Any]:
    """The extras that this kind of target can have."""
    extras = dict(EXTRAS[name])
    if "weight" in extras:
        extras["weight"] = extras["weight"].to(dtype)
    if target == "probabilities":
        extras.pop("shift", None)
        if "returns" in extras:
            extras["returns"] = tuple(r for r in extras["returns"] if r != "accuracy")
    return extras


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXTRAS)
def test_extra_is_the_formula(name: str, kind: str, target: str, dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS if dtype != torch.bfloat16 or name == "all" else ("mean",):
        leaves, y = operands(kind, target, dtype)
        compare(kind, leaves, y, reduction=reduction, **fitted(name, target, dtype))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_of_extras(kind: str, target: str) -> None:
    """Without `returns` the gradient is made in the forward, with it in the backward: two ways to a second derivative."""
    for returns, reduction in (((), "mean"), (("lse", "entropy"), "none")):
        leaves, y = operands(kind, target, torch.float64)
        extras = {**fitted("all", target, torch.float64), "returns": returns, "reduction": reduction}
        f = lambda *t, y=y, extras=extras: scalar(call(kind, list(t), y, **extras))  # noqa: E731
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph_with_all_extras(kind: str) -> None:
    leaves, y = operands(kind, "ids", torch.float32)
    extras = fitted("all", "ids", torch.float32) | ({"max_extra_bytes": 4 * V * 4} if kind == "linear" else {})
    torch._dynamo.reset()
    f = torch.compile(lambda *t: call(kind, list(t), y, **extras), fullgraph=True, backend="aot_eager")
    ours, eager = f(*leaves), call(kind, leaves, y, **extras)
    for a, b in zip(values(ours), values(eager), strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(scalar(out), leaves) for out in (ours, eager))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_rows_return_zeros(kind: str) -> None:
    leaves, y = operands(kind, "ids", torch.float32)
    _, extras = call(kind, leaves, y, returns=("lse", "accuracy", "entropy"))
    for t in extras.values():
        assert t.shape == y.shape and (t[y == IGNORED] == 0).all()
    assert extras["lse"].requires_grad and extras["entropy"].requires_grad and not extras["accuracy"].requires_grad
    assert (extras["lse"][y != IGNORED] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_finds_the_largest(kind: str) -> None:
    leaves, y = operands(kind, "ids", torch.float32)
    best = logits_of(kind, leaves).argmax(-1)
    y[1] = best[1]
    y[0] = torch.where(y[0] == IGNORED, IGNORED, (best[0] + 1) % V)
    _, extras = call(kind, leaves, y, returns=["accuracy"])
    torch.testing.assert_close(extras["accuracy"], ((best == y) & (y != IGNORED)).float())
    assert extras["accuracy"][1].sum() == (y[1] != IGNORED).sum() > 0


def test_one_row_without_a_batch() -> None:
    z, y = torch.randn(V, dtype=torch.float64, requires_grad=True), torch.tensor(3)
    for reduction in REDUCTIONS:
        extras: Any = dict(z_loss=0.2, softcap=2.0, logit_scale=1.5, returns=("lse", "entropy"), reduction=reduction)
        ours, truth = fastloss.cross_entropy(z, y, **extras), formula(z, y, **extras)
        for a, b in zip(values(ours), values(truth), strict=True):
            assert a.shape == ()
            torch.testing.assert_close(a, b)
    x, w = torch.randn(D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    ours, truth = fastloss.linear_cross_entropy(x, w, y, **extras), formula(x @ w.T, y, **extras)
    for a, b in zip(values(ours), values(truth), strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------- what an extra meets on its way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXTRAS)
def test_uint8_targets(name: str, kind: str, dtype: torch.dtype) -> None:
    """torch takes them for cross entropy; what is beyond torch must not get lost on that path."""
    for reduction in ("mean", "none"):
        leaves, y = operands(kind, "ids", dtype)
        compare(kind, leaves, y.to(torch.uint8), reduction=reduction, **fitted(name, "ids", dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_uint8_targets_shift_when_ignore_index_is_no_uint8(kind: str) -> None:
    leaves, y = operands(kind, "ids", torch.float64)
    for extras in (dict(shift=True), dict(shift=True, returns=("lse",)), dict(z_loss=0.2)):
        ours = call(kind, leaves, y.to(torch.uint8), ignore_index=-100, **extras)
        truth = formula(logits_of(kind, leaves), y, ignore_index=-100, **extras)
        for a, b in zip(values(ours), values(truth), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("target", ["ids", "probabilities", "uint8"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_with_returns(kind: str, target: str) -> None:
    x = torch.randn(0, V if kind == "logits" else D, requires_grad=True)
    y = (
        torch.rand(0, V)
        if target == "probabilities"
        else torch.zeros(0, dtype=torch.long if target == "ids" else torch.uint8)
    )
    names = ("lse", "entropy") if target == "probabilities" else ("lse", "accuracy", "entropy")
    for reduction in REDUCTIONS:
        extras: dict[str, Any] = dict(reduction=reduction, returns=names, z_loss=0.1, softcap=2.0)
        if kind == "logits":
            loss, numbers = fastloss.cross_entropy(x, y, **extras)
        else:
            loss, numbers = fastloss.linear_cross_entropy(x, torch.randn(V, D), y, **extras)
        plain = F.cross_entropy(torch.randn(0, V), y, reduction=reduction)
        torch.testing.assert_close(loss.detach(), plain, equal_nan=True)
        assert set(numbers) == set(names) and all(t.shape == (0,) for t in numbers.values())


@pytest.mark.parametrize("name", ["z_loss", "softcap", "logit_scale", "scale and cap", "returns", "weight"])
@pytest.mark.parametrize("target", TARGETS)
def test_heads_of_several_positions(name: str, target: str) -> None:
    """linear_weight (C, K, D): the logits are (N, C, K)."""
    n, many = 4, 3
    x, w = torch.randn(n, D, dtype=torch.float64), torch.randn(V, many, D, dtype=torch.float64)
    y = torch.randint(0, V, (n, many))
    y[1, 2] = IGNORED
    if target == "probabilities":
        y = torch.rand(n, V, many, dtype=torch.float64).softmax(1)
    for reduction in REDUCTIONS:
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        extras = fitted(name, target, torch.float64) | {"reduction": reduction}
        soft = y.is_floating_point()
        ours = fastloss.linear_cross_entropy(*leaves, y, ignore_index=None if soft else IGNORED, **extras)
        truth = formula(torch.einsum("nd,vkd->nkv", *leaves), y.movedim(1, -1) if soft else y, **extras)
        for a, b in zip(values(ours), values(truth), strict=True):
            torch.testing.assert_close(a, b)
        grads = (torch.autograd.grad(scalar(out), leaves) for out in (ours, truth))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


REFUSED: dict[str, Any] = dict(z_loss=0.1, softcap=2.0, logit_scale=0.5, shift=True, returns=("lse",))


@pytest.mark.parametrize("name", [*REFUSED, "grad_weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_wrapper_tensors_refuse_extras(kind: str, name: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    if name == "grad_weight" and kind == "logits":
        return
    pair = lambda t: TwoTensor(t, t.clone())  # noqa: E731
    y = torch.randint(0, V, (4,))
    value = torch.zeros(V, D) if name == "grad_weight" else REFUSED[name]
    with pytest.raises(ValueError, match=name):
        if kind == "logits":
            fastloss.cross_entropy(pair(torch.randn(4, V)), pair(y), **{name: value})
        else:
            fastloss.linear_cross_entropy(pair(torch.randn(4, D)), pair(torch.randn(V, D)), pair(y), **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_no_sense_is_refused(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        leaves, q = operands(kind, "probabilities", dtype)
        with pytest.raises(ValueError, match="shift"):
            call(kind, leaves, q, shift=True)
        with pytest.raises(ValueError, match="accuracy"):
            call(kind, leaves, q, returns=("accuracy",))
        leaves, y = operands(kind, "ids", dtype)
        with pytest.raises(ValueError, match="'perplexity'"):
            call(kind, leaves, y, returns=("lse", "perplexity"))
        with pytest.raises(ValueError, match=r"softcap.*-1"):
            call(kind, leaves, y, softcap=-1.0)


# ------------------------------------------------------------------------------------ extras of the linear head


class Recorder(TorchDispatchMode):
    """The arguments of every fastloss op, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastloss":
            names = [a.name for a in function._schema.arguments]
            defaults = {a.name: a.default_value for a in function._schema.arguments}
            self.calls.append(defaults | dict(zip(names, args, strict=False)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_limits_on_chunks_change_nothing_and_arrive(target: str, reduction: str, dtype: torch.dtype) -> None:
    leaves, y = operands("linear", target, dtype)
    limits: list[dict[str, Any]] = [
        {"max_extra_bytes": 1},
        {"max_extra_bytes": 4 * V * dtype.itemsize},
        {"options": fastloss.nn.LinearCrossEntropyOptions(batch_chunk_size=4)},
        {"options": fastloss.nn.LinearCrossEntropyOptions(batch_chunk_size=4), "returns": ("lse", "entropy")},
    ]
    for limit in limits:
        with Recorder() as recorder:
            compare("linear", leaves, y, reduction=reduction, z_loss=0.1, **limit)
        want = limit.get("max_extra_bytes", 4 * V * dtype.itemsize)
        seen = {c["max_extra_bytes"] for c in recorder.calls if "max_extra_bytes" in c}
        assert seen == {want}, f"the ops were given {seen}"
    for bad in (0, -5):
        with pytest.raises(ValueError, match=rf"max_extra_bytes.*{bad}"):
            call("linear", leaves, y, max_extra_bytes=bad)


@pytest.mark.parametrize("extras", [{}, EXTRAS["all"]], ids=["plain", "all extras"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_weight_gradient_is_added_to_a_buffer(target: str, reduction: str, extras: dict[str, Any]) -> None:
    extras = fitted("all", target, torch.float32) if extras else {}
    (x, w, b), y = operands("linear", target, torch.float32)
    start = torch.randn(V, D)
    buffer = start.clone()
    out = call("linear", [x, w, b], y, reduction=reduction, grad_weight=buffer, **extras)
    scalar(out).backward()
    exact = wide([x, w, b])
    truth = formula(F.linear(*exact), y, reduction=reduction, **extras)
    want = torch.autograd.grad(scalar(truth), exact)
    assert w.grad is None
    for got, r in zip((x.grad, buffer - start, b.grad), want, strict=True):
        torch.testing.assert_close(got.double(), r, rtol=1e-5, atol=3e-5)
    scalar(call("linear", [x, w, b], y, reduction=reduction, grad_weight=buffer, **extras)).backward()
    torch.testing.assert_close((buffer - start).double(), 2 * want[1], rtol=1e-5, atol=6e-5)


def test_weight_gradient_buffer_that_does_not_fit() -> None:
    (x, w, b), y = operands("linear", "ids", torch.float32)
    bad = {
        rf"\({V}, {D + 1}\)": torch.zeros(V, D + 1),
        "torch.bfloat16": torch.zeros(V, D, dtype=torch.bfloat16),
        "torch.float64": torch.zeros(V, D, dtype=torch.float64),
        "meta": torch.zeros(V, D, device="meta"),
    }
    for given, buffer in bad.items():
        for f in (
            lambda t: call("linear", [x, w, b], y, grad_weight=t),
            lambda t: fastloss.linear_row_stats(x, w, y, grad_weight=t),
            lambda t: fastloss.linear_row_loss(x, w, y, lambda s: s.nll, grad_weight=t),
        ):
            with pytest.raises(ValueError, match=f"grad_weight.*{given}"):
                f(buffer)


@pytest.mark.parametrize("case", ["positions", "uint8", "float64", "empty", "autocast"])
def test_weight_gradient_buffer_is_used_or_refused(case: str) -> None:
    """Never the third: dW in linear_weight.grad, the buffer left as it was."""
    dtype = torch.float64 if case == "float64" else torch.float32
    many = (2,) if case == "positions" else ()
    n = 0 if case == "empty" else 4
    x, w = torch.randn(n, D, dtype=dtype, requires_grad=True), torch.randn(V, *many, D, dtype=dtype, requires_grad=True)
    y = torch.randint(0, V, (n, *many)).to(torch.uint8 if case == "uint8" else torch.int64)
    buffer = torch.zeros(V, *many, D)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            fastloss.linear_cross_entropy(x, w, y, reduction="sum", grad_weight=buffer).backward()
    except ValueError as error:
        assert case != "autocast" and "grad_weight" in str(error)
        return
    assert case != "positions", "a head of several positions cannot honour grad_weight"
    (want,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w), y, reduction="sum"), w)
    assert w.grad is None or not w.grad.abs().any()
    torch.testing.assert_close(buffer, want.float(), rtol=0.05, atol=0.1 if case == "autocast" else 1e-4)


@pytest.mark.parametrize("case", ["float64", "positions", "positions and returns", "uint8"])
def test_limit_is_obeyed_or_refused(case: str) -> None:
    dtype = torch.float64 if case == "float64" else torch.float32
    many = (2,) if "positions" in case else ()
    x, w = torch.randn(4, D, dtype=dtype, requires_grad=True), torch.randn(V, *many, D, dtype=dtype)
    y = torch.randint(0, V, (4, *many)).to(torch.uint8 if case == "uint8" else torch.int64)
    extras = {"returns": "lse"} if "returns" in case else {}
    try:
        with Recorder() as recorder:
            fastloss.linear_cross_entropy(x, w, y, max_extra_bytes=100, **extras)
    except ValueError as error:
        assert "max_extra_bytes" in str(error)
        return
    assert {c.get("max_extra_bytes") for c in recorder.calls} == {100}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_modules_pass_extras_on(reduction: str) -> None:
    extras: Any = dict(z_loss=0.1, softcap=3.0, logit_scale=0.6, shift=True, reduction=reduction, ignore_index=IGNORED)
    (z,), y = operands("logits", "ids", torch.float64)
    ours = fastloss.nn.CrossEntropyLoss(**extras)(z.movedim(-1, 1), y)
    torch.testing.assert_close(ours, formula(z, y, **extras))
    head = fastloss.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64, max_extra_bytes=500, **extras)
    (x, _, _), y = operands("linear", "ids", torch.float64)
    ours = head(x, y, returns=("lse", "accuracy", "entropy"))
    truth = formula(head.linear(x), y, returns=("lse", "accuracy", "entropy"), **extras)
    for a, b in zip(values(ours), values(truth), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_skip_ignored_changes_nothing(reduction: str) -> None:
    for name in ("z_loss", "all"):
        leaves, y = operands("linear", "ids", torch.float32)
        compare("linear", leaves, y, reduction=reduction, skip_ignored=True, **fitted(name, "ids", torch.float32))
        leaves, q = operands("linear", "probabilities", torch.float32)
        compare("linear", leaves, q, reduction=reduction, skip_ignored=True, z_loss=0.1)


# ---------------------------------------------------------------------------------------------- the rows engine


def test_row_stats_refuses_what_it_cannot_use() -> None:
    z, x, w, y = torch.randn(4, V), torch.randn(4, D), torch.randn(V, D), torch.randint(0, V, (4,))
    for stats in (lambda t, **k: fastloss.row_stats(z, t, **k), lambda t, **k: fastloss.linear_row_stats(x, w, t, **k)):
        for bad in (torch.ones(V + 1), torch.ones(1), torch.ones(1, V), torch.ones(())):
            with pytest.raises(ValueError, match="column_weight"):
                stats(y, stats="sum", column_weight=bad)
        with pytest.raises(ValueError, match="column_weight"):
            stats(y, stats="sum", column_weight=torch.ones(V, requires_grad=True))
        meta = torch.device("meta")
        with pytest.raises(ValueError, match=r"column_weight.*meta"):
            stats(y, stats="sum", column_weight=torch.ones(V, device=meta))
        with pytest.raises(ValueError, match=r"target.*meta"):
            stats(y.to(meta))
        with pytest.raises(ValueError, match=r"target.*meta"):
            stats(torch.rand(4, V, device=meta))
        with pytest.raises(ValueError, match=r"temperature.*meta"):
            stats(y, stats="tempered_lse", temperature=torch.ones(4, device=meta))
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=str(dtype)):
            fastloss.row_stats(z.to(dtype), y)
        with pytest.raises(TypeError, match=str(dtype)):
            fastloss.linear_row_stats(x.to(dtype), w.to(dtype), y)
    with pytest.raises(ValueError, match=r"\(\)"):
        fastloss.row_stats(torch.tensor(1.0))
    with pytest.raises((ValueError, RuntimeError), match=r"\(\)"):
        fastloss.linear_row_stats(torch.tensor(1.0), w)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_ignored_rows_are_zero(kind: str, backend: str) -> None:
    if backend == "cpp" and compiled.MISSING:
        pytest.skip(compiled.MISSING)
    leaves, y = operands(kind, "ids", torch.float32)
    asked: Any = dict(stats=("entropy", "argmax", "tempered_lse"), temperature=0.7, ignore_index=IGNORED)
    with fastloss.use_backend(backend):
        if kind == "logits":
            s = fastloss.row_stats(*leaves, y, **asked)
        else:
            s = fastloss.linear_row_stats(*leaves[:2], y, linear_bias=leaves[2], **asked)
        ignored = y == IGNORED
        z = logits_of(kind, leaves).detach().double()
        picked = z.gather(-1, y[..., None])[..., 0]
        logp = z.log_softmax(-1)
        truth = {
            "lse": z.logsumexp(-1), "entropy": -(logp.exp() * logp).sum(-1), "accuracy": (z.argmax(-1) == y).double(),
            "tempered_lse": (z / 0.7).logsumexp(-1), "nll": z.logsumexp(-1) - picked,
        }  # fmt: skip
        for name, want in truth.items():
            got = getattr(s, name)
            assert got.shape == y.shape and (got[ignored] == 0).all(), name
            torch.testing.assert_close(got[~ignored].double(), want[~ignored], rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad((s.lse + s.entropy + s.tempered_lse + s.nll).sum(), leaves[0])
    assert grad.isfinite().all() and (grad[ignored] == 0).all()


SEPARABLE: dict[str, tuple[Callable[[RowStats], Tensor], dict[str, Any], tuple[str, ...]]] = {
    "focal": (lambda s: (1 - s.logp.exp()) ** 2 * -s.logp, {}, ("ids",)),
    "z loss": (lambda s: s.nll + 0.1 * s.lse**2, {"softcap": 2.0, "logit_scale": 1.3}, ("ids", "probabilities")),
    "entropy": (lambda s: s.nll - 0.3 * s.entropy, {"stats": "entropy"}, ("ids", "probabilities")),
    "smoothed": (
        lambda s: s.nll + 0.2 * s.nll_sum, {"stats": "sum", "column_weight": torch.linspace(0.1, 1, V)},
        ("ids", "probabilities"),
    ),
    "tempered": (
        lambda s: s.tempered_lse**2 + s.max,
        {"stats": ("tempered_lse", "argmax"), "temperature": torch.linspace(0.5, 2, B * T).view(B, T)},
        ("ids", "none"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_is_the_same_loss(name: str, dtype: torch.dtype) -> None:
    loss, asked, targets = SEPARABLE[name]
    variants = (("mean", None, None), ("sum", 0, 3 * V * dtype.itemsize), ("mean", 1, 1), ("sum", 2, None))
    upstream = torch.tensor(0.7, dtype=torch.float64)
    for target in targets:
        leaves, y = operands("linear", "ids" if target == "none" else target, dtype)
        y = None if target == "none" else y
        exact_y = y.double() if target == "probabilities" else y
        for reduction, frozen, limit in variants:
            given = [t.detach().clone().requires_grad_(i != frozen) for i, t in enumerate(leaves)]
            results = []
            for (x, w, b), q, separable in ((given, y, True), (given, y, False), (wide(given), exact_y, False)):
                value = fastloss.linear_row_loss(
                    x, w, q, loss, linear_bias=b, reduction=reduction, separable=separable, ignore_index=IGNORED,
                    max_extra_bytes=limit, **asked,
                )  # fmt: skip
                needed = [t for t in (x, w, b) if t.requires_grad]
                results.append((value, torch.autograd.grad(value, needed, upstream.to(value.dtype))))
            (a, ga), (b, gb), (r, gr) = results
            assert a.dtype == b.dtype and a.shape == () and all(t.dtype == dtype for t in ga)
            check_close(a, b, r, dtype, ROUNDINGS[dtype])
            gradients_agree(ga, gb, gr)


def test_separable_works_chunk_by_chunk_in_the_forward() -> None:
    x, w, y = torch.randn(12, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.randint(0, V, (12,))
    seen: list[int] = []

    def loss(s: RowStats) -> Tensor:
        seen.append(s.nll.numel())
        return s.nll

    asked: Any = dict(separable=True, max_extra_bytes=4 * V * 4, reduction="sum")
    value = fastloss.linear_row_loss(x, w, y, loss, **asked)
    assert max(seen) <= 4 and sum(seen) >= 12
    calls, saved = len(seen), []
    value.backward(retain_graph=True)
    assert len(seen) == calls, "the backward should find its gradients made"
    first = x.grad.clone()
    x.grad.zero_()
    value.backward()
    assert torch.equal(x.grad, first)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fastloss.linear_row_loss(x, w, y, loss, **asked)
    assert saved and max(saved) < 12 * V, "logits were saved"
    with torch.no_grad():
        torch.testing.assert_close(fastloss.linear_row_loss(x, w, y, loss, **asked), value.detach())
    for reduction in ("none", "average"):
        with pytest.raises(ValueError, match=reduction):
            fastloss.linear_row_loss(x, w, y, loss, separable=True, reduction=reduction)
    with pytest.raises(ValueError, match="one value a row"):
        fastloss.linear_row_loss(x, w, y, lambda s: s.nll.sum(), separable=True)


def test_second_derivatives_of_the_engine() -> None:
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, D), (V, D), (V,)))
    y = torch.tensor([1, 4, IGNORED, 0])
    loss: Callable[[RowStats], Tensor] = lambda s: s.nll**2 + 0.2 * s.entropy  # noqa: E731
    asked: Any = dict(stats="entropy", ignore_index=IGNORED, softcap=3.0)
    for separable in (False, True):
        f = lambda x, w, b, s=separable: fastloss.linear_row_loss(  # noqa: E731
            x, w, y, loss, linear_bias=b, separable=s, **asked
        )
        assert torch.autograd.gradcheck(f, (x, w, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (x, w, b), fast_mode=True)
    z = torch.randn(4, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: fastloss.row_loss(z, y, loss, **asked), (z,), fast_mode=True)


# -------------------------------------------------------------------------------------------------- numbers


def test_autocast_leaves_float64_alone() -> None:
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((8, D), (V, D), (V,)))
    y = torch.randint(0, V, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w, b)
        theirs = F.cross_entropy(z, y)
        for ours in (
            fastloss.linear_cross_entropy(x, w, y, linear_bias=b),
            fastloss.linear_cross_entropy(x, w, y, linear_bias=b, logit_scale=1.0, z_loss=1e-300),
            fastloss.cross_entropy(z, y),
            fastloss.linear_cross_entropy(x, w, y, linear_bias=b, reduction="none").mean(),
        ):
            assert ours.dtype == theirs.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, r in zip(torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(theirs, (x, w, b)), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["kernels", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a CPU runs on, and the tensor operations and chunks that a GPU shares with the reference."""
    if request.param == "kernels":
        yield request.param
        return
    monkeypatch.setattr(fastloss.fused, "_C", None)
    with fastloss.use_backend("reference"):
        yield request.param


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_all_rows_ignored(dtype: torch.dtype, reduction: str, path: str) -> None:
    leaves = [torch.randn(*s).to(dtype).requires_grad_() for s in ((4, D), (V, D), (V,))]
    x, w, b = leaves
    y = torch.full((4,), -100)
    want = F.cross_entropy(F.linear(*leaves), y, reduction=reduction)
    cotangent = torch.full_like(want, 0.3)
    expected = torch.autograd.grad(want, leaves, cotangent)
    for ours in (
        fastloss.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction),
        fastloss.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, returns="lse")[0],
        fastloss.cross_entropy(F.linear(*leaves), y, reduction=reduction),
    ):
        torch.testing.assert_close(ours, want, equal_nan=True)
        for a, r in zip(torch.autograd.grad(ours, leaves, cotangent), expected, strict=True):
            torch.testing.assert_close(a, r, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("upstream", [1.0, 0.3, 2.0**13])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_far_from_one(reduction: str, upstream: float, dtype: torch.dtype, path: str) -> None:
    """A GradScaler's factor: our linear gradients must not have rounded, or underflowed, before it.

    The inputs are small, so that dW for an upstream gradient of 1 is below what float16 can hold.
    """
    n, d, v = 512, 16, 129
    if reduction == "sum":
        upstream /= n  # float16 would overflow, in torch as well
    leaves = [(torch.randn(n, d) / 4000).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()]
    y = torch.randint(0, v, (n,))
    y[::7] = -100
    theirs = F.cross_entropy(F.linear(*leaves), y, reduction=reduction)
    exact = wide(leaves)
    truth = F.cross_entropy(F.linear(*exact), y, reduction=reduction)
    up = torch.tensor(upstream, dtype=theirs.dtype)
    plain = torch.autograd.grad(theirs, leaves, up)
    expected = torch.autograd.grad(truth, exact, up.double())
    for retain in (False, True):
        loss = fastloss.linear_cross_entropy(*leaves, y, reduction=reduction)
        ours = torch.autograd.grad(loss, leaves, up, retain_graph=retain)
        for a, b, r in zip(ours, plain, expected, strict=True):
            check_gradient(a, b, r, dtype)


# ---------------------------------------------------------------------------------------------- kept memory


@pytest.fixture
def kept() -> Iterator[None]:
    if compiled.MISSING:
        pytest.skip(compiled.MISSING)
    gc.collect()
    assert fastloss.keep_memory(0) == 0
    fastloss.keep_memory(1 << 30)
    yield
    fastloss.keep_memory(0)
    fastloss.keep_memory(1 << 30)


def gradient(z: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(fastloss.cross_entropy(z, y), z)[0]


def test_a_large_gradient_is_made_of_kept_memory(kept: None) -> None:
    z, y = torch.randn(1200, 1000, requires_grad=True), torch.randint(0, 1000, (1200,))
    first = gradient(z, y)
    where, copy = first.data_ptr(), first.clone()
    assert first.nbytes >= 4 << 20
    assert fastloss.keep_memory(1 << 30) < first.nbytes, "memory in use is not kept memory"
    del first
    assert fastloss.keep_memory(1 << 30) >= copy.nbytes
    flipped = z.detach().flip(1).requires_grad_()
    again = gradient(flipped, 999 - y)
    assert again.data_ptr() == where and fastloss.keep_memory(1 << 30) < copy.nbytes
    torch.testing.assert_close(again, copy.flip(1))
    del again
    assert fastloss.keep_memory(4 << 20) <= 4 << 20, "a lower limit drops what is over it"
    assert fastloss.keep_memory(0) == 0
    third = gradient(z, y)
    torch.testing.assert_close(third, copy)
    del third
    assert fastloss.keep_memory(0) == 0, "with a limit of 0 nothing may be kept"


def test_two_gradients_alive_do_not_share_memory(kept: None) -> None:
    z, y = torch.randn(1200, 1000, requires_grad=True), torch.randint(0, 1000, (1200,))
    a = gradient(z, y)
    view = a[1:3]  # keeps the block alive
    value = view.clone()
    del a
    b = gradient((z.detach() * 2).requires_grad_(), y)
    assert torch.equal(view, value) and b.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_keep_memory_refuses_a_negative_number() -> None:
    with pytest.raises(ValueError, match="-1"):
        fastloss.keep_memory(-1)


# ---------------------------------------------------------------------------------------------- switches


def test_device_check_can_be_switched_and_does_nothing_on_a_cpu() -> None:
    z, y = torch.randn(3, V), torch.tensor([0, V, 1])
    for enabled in (True, False):
        fastloss.check_device_targets(enabled)
        with pytest.raises(IndexError, match=f"target {V} at row 1"):
            fastloss.cross_entropy(z, y)


PROBE = "import torch, fastloss; print(fastloss.explain('row_stats', torch.randn(2, 3)).splitlines()[0])"


def test_backend_named_by_the_environment() -> None:
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROBE], env={**os.environ, "FASTLOSS_BACKEND": name}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name in ("reference", "fastest")
    }  # fmt: skip
    out = {name: (*p.communicate(timeout=120), p.returncode) for name, p in started.items()}
    assert out["reference"][2] == 0 and out["reference"][0].strip().endswith("reference"), out["reference"]
    assert out["fastest"][2] != 0 and "ValueError: unknown backend 'fastest'" in out["fastest"][1]


def test_shift_keeps_sequences_apart_where_torch_runs() -> None:
    """A head without features runs on torch's functions: the first token of a sequence is still not its neighbour's target."""
    x, w, y = torch.zeros(2, 3, 0), torch.zeros(5, 0), torch.randint(0, 5, (2, 3))
    bias = torch.randn(5)
    loss, numbers = fastloss.linear_cross_entropy(x, w, y, linear_bias=bias, shift=True, returns="lse")
    want = F.cross_entropy(bias.expand(4, 5), y[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    assert numbers["lse"].shape == (2, 3) and (numbers["lse"][:, -1] == 0).all()
    alone = fastloss.linear_cross_entropy(
        torch.randn(4), torch.randn(5, 4), torch.tensor(2), shift=True, reduction="sum"
    )
    assert alone == 0
