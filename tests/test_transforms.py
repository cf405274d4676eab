"""torch.compile, torch.func, second derivatives, autocast, retain_graph: the places where peers break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

import fastloss

N, D, V = 7, 6, 33


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    y = torch.randint(0, V, (N,))
    y[2] = -100
    return x, w, y


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits": lambda x, w, y: fastloss.cross_entropy(x @ w.T, y, label_smoothing=0.1),
    "logits, none": lambda x, w, y: fastloss.cross_entropy(x @ w.T, y, reduction="none").square().sum(),
    "linear": lambda x, w, y: fastloss.linear_cross_entropy(x, w, y, label_smoothing=0.1),
    "linear, none": lambda x, w, y: fastloss.linear_cross_entropy(x, w, y, reduction="none").square().sum(),
    "row loss": lambda x, w, y: fastloss.linear_row_loss(x, w, y, lambda s: -s.logp + 0.1 * s.entropy, stats="entropy"),
}


def eager_gradients(f: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(x, w, y), (x, w))


@pytest.mark.parametrize("name", CASES)
def test_compile_fullgraph(name: str) -> None:
    """One graph forward and backward with inductor's front end, and our op inside it."""
    f, (x, w, y) = CASES[name], operands()
    ops: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    for a, b in zip(eager_gradients(compiled, x, w, y), eager_gradients(f, x, w, y), strict=True):
        torch.testing.assert_close(a, b)
    assert any("fastloss" in op for op in ops), ops


def test_compile_inductor_dynamic_shapes() -> None:
    torch._dynamo.reset()
    f = torch.compile(CASES["linear"], fullgraph=True, dynamic=True)
    for n in (7, 9, 12):
        x, w, y = (
            torch.randn(n, D, requires_grad=True),
            torch.randn(V, D, requires_grad=True),
            torch.randint(0, V, (n,)),
        )
        for a, b in zip(eager_gradients(f, x, w, y), eager_gradients(CASES["linear"], x, w, y), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_func_grad_vmap_and_jvp(name: str) -> None:
    f, (_, w, y) = CASES[name], operands()
    w, y, xs = w.detach(), y.clamp(min=0), torch.randn(3, N, D)
    got = vmap(grad(lambda x: f(x, w, y)))(xs)
    each = torch.stack([torch.autograd.grad(f(x, w, y), x)[0] for x in (t.clone().requires_grad_() for t in xs)])
    torch.testing.assert_close(got, each)
    tangent = torch.randn(N, D)
    _, directional = jvp(lambda x: f(x, w, y), (xs[0],), (tangent,))
    torch.testing.assert_close(directional, (each[0] * tangent).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    x, w, y = operands(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: CASES[name](x, w, y), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: CASES[name](x, w, y), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_second_backward_is_bit_equal(name: str, upstream: float, dtype: torch.dtype) -> None:
    x, w, y = operands(dtype)
    loss = CASES[name](x, w, y)
    up = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, (x, w), up, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()  # what the caller does with a gradient is the caller's business
    again = torch.autograd.grad(loss, (x, w), up, retain_graph=True)
    last = torch.autograd.grad(loss, (x, w), up)
    for a, b, c in zip(kept, again, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", CASES)
def test_two_runs_are_bit_equal(name: str) -> None:
    x, w, y = operands()
    for a, b in zip(eager_gradients(CASES[name], x, w, y), eager_gradients(CASES[name], x, w, y), strict=True):
        assert torch.equal(a, b)


def test_gradients_accumulate() -> None:
    x, w, y = operands()
    fastloss.linear_cross_entropy(x, w, y).backward()
    once = x.grad.clone()
    fastloss.linear_cross_entropy(x, w, y).backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_torchs_dtypes(dtype: torch.dtype) -> None:
    x, w, y = operands()
    with torch.autocast("cpu", dtype):
        theirs, ours = F.cross_entropy(F.linear(x, w), y), fastloss.linear_cross_entropy(x, w, y)
        logits = F.linear(x, w)
        assert ours.dtype == theirs.dtype == fastloss.cross_entropy(logits, y).dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)


def test_named_backend_that_cannot_run_says_why() -> None:
    x, _, y = operands(torch.float64)
    with (
        fastloss.use_backend("cpp"),
        pytest.raises(fastloss.BackendError, match=r"float32, float16 and bfloat16.*float64"),
    ):
        fastloss.cross_entropy(x, y % D)
    with pytest.raises(ValueError, match="unknown backend 'nope'"), fastloss.use_backend("nope"):
        pass
    assert "float64" in fastloss.explain("row_stats", x)


def test_dtensor_and_other_wrappers_go_to_torch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    z, y = torch.randn(4, 9), torch.randint(0, 9, (4,))
    pair = fastloss.cross_entropy(TwoTensor(z, z.clone()), TwoTensor(y, y.clone()))
    torch.testing.assert_close(pair.a, F.cross_entropy(z, y))
