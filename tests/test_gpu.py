"""What only a GPU can show: every op on every GPU backend against fp64, streams, graphs, no host sync, large tensors."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.contract import NUM_COEFS, NUM_EPILOGUES, Coef, Term, TermCoef, TermStat, Want
from hard_rows import ROWS, hard_rows
from tolerance import check_close, check_gradient

pytestmark = pytest.mark.gpu
OPS = torch.ops.fastloss
BACKENDS = ("cuda", "triton", "reference")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.TEMPERED | Want.ARGMAX)


def available(backend: str) -> str:
    """The backend, or a skip with the reason; a failure where every backend must be there."""
    with fastloss.use_backend(backend):
        try:
            fastloss.registry.choose("row_stats", torch.zeros(1, 8, device="cuda"))
        except fastloss.BackendError as reason:
            if os.environ.get("FASTLOSS_GPU_STRICT") == "1":
                pytest.fail(str(reason))
            pytest.skip(str(reason))
    return backend


def rows(kind: str, n: int, v: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    z = (torch.randn(n, v, device="cuda") * 3).to(dtype)
    y = torch.randint(0, v, (n,), device="cuda") if kind == "ids" else None
    if y is not None and n > 2:
        y[2] = -100
    q = torch.rand(n, v, device="cuda").softmax(-1).to(dtype) if kind == "probabilities" else None
    return z, y, q, torch.rand(v, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ids", "probabilities", "none"])
@pytest.mark.parametrize("forward, backward", list(itertools.product(BACKENDS, BACKENDS)))
def test_rows(forward: str, backward: str, kind: str, dtype: torch.dtype) -> None:
    """Any forward with any backward, all statistics, softcap and scale, on sizes that cross every block."""
    available(forward), available(backward)
    for n, v in ((1, 1), (3, 37), (5, 5003), (2, 131072)):
        args, tail = rows(kind, n, v, dtype), (-100, ALL, 0.7, 6.0)
        coef = torch.randn(NUM_COEFS, n, device="cuda")
        if kind == "none":
            coef[Coef.OWN] = 0
        with fastloss.use_backend(forward):
            stats, argmax = OPS.row_stats(*args, *tail)
        with fastloss.use_backend(backward):
            dz = OPS.row_stats_backward(coef, stats, argmax, *args, *tail)
        with fastloss.use_backend("reference"):
            truth, top = OPS.row_stats(*wide(*args), *tail)
            dtruth = OPS.row_stats_backward(coef.double(), truth, top, *wide(*args), *tail)
        torch.testing.assert_close(stats.double(), truth, rtol=5e-6, atol=5e-6 * max(1, v**0.5))
        assert torch.equal(argmax, top)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dz.double(), dtruth, rtol=eps + 1e-5, atol=eps * 0.1 + 2e-5)


TERMS_ON_GPU = [b for b in BACKENDS if b in fastloss.registry.backends("row_terms")]
EVERY_TERM = int(ALL & ~Want.TEMPERED | Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN | Want.TERM | Want.SUBSET)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("term", [Term.KL, Term.MIXTURE, Term.TOTAL_VARIATION, Term.LOG_COSH, Term.BCE_LOGITS])
@pytest.mark.parametrize("forward, backward", list(itertools.product(TERMS_ON_GPU, TERMS_ON_GPU)))
def test_terms(forward: str, backward: str, term: Term, dtype: torch.dtype) -> None:
    """Any forward with any backward of row_terms, all statistics, on rows that are whole and rows that are split."""
    available(forward), available(backward)
    sizes = ((1, 1, 1), (3, 37, 0), (700, 5003, 3), (2, 131072, 2), (600, 65536, 1))
    for n, v, k in sizes[term == Term.TOTAL_VARIATION :]:  # of one column p = q, and the sign of p - q is rounding
        z, t = ((torch.randn(n, v, device="cuda") * 2).to(dtype) for _ in range(2))
        listed = torch.randint(0, v, (n, k), device="cuda") if k else None
        if listed is not None and n > 2:
            listed[2, 0] = -100
        warm = torch.rand(n, device="cuda") + 0.5 if v < 65536 else None
        args = (listed, t, None, torch.rand(v, device="cuda") < 0.3, warm)
        tail = (-100, EVERY_TERM, 0.7, 6.0, int(term), 0.7, 0.4, 0.3)
        coef = torch.randn(TermCoef.LISTED + k, n, device="cuda")
        with fastloss.use_backend(forward):
            stats, argmax = OPS.row_terms(z, *args, *tail)
        with fastloss.use_backend(backward):
            dz = OPS.row_terms_backward(coef, stats, argmax, z, *args, *tail)
        few = slice(0, 8)  # float64 of all rows would not fit
        args = (
            *(a[few] if a is not None else None for a in args[:2]),
            None,
            args[3],
            None if warm is None else warm[few],
        )
        with fastloss.use_backend("reference"):
            truth, top = OPS.row_terms(z[few].double(), *wide(*args), *tail)
            dtruth = OPS.row_terms_backward(coef[:, few].double(), truth, top, z[few].double(), *wide(*args), *tail)
        torch.testing.assert_close(stats[:, few].double(), truth, rtol=1e-5, atol=1e-5 * max(1, v**0.5))
        assert torch.equal(argmax[few], top)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dz[few].double(), dtruth, rtol=eps + 1e-5, atol=eps * 0.1 + 4e-5)


@pytest.mark.parametrize("backend", TERMS_ON_GPU[:1])
def test_terms_with_generated_targets(backend: str) -> None:
    """HL-Gauss: the row's probabilities are made in the kernel, by erf and its complement of the device."""
    available(backend)
    z, value = torch.randn(300, 101, device="cuda"), torch.rand(300, device="cuda") * 24 - 12
    args = (-100, int(Want.SCORE_MEAN), 1.0, 0.0, 0, -10.0, 20 / 101, 0.15)
    coef = torch.zeros(TermCoef.LISTED, 300, device="cuda")
    coef[TermCoef.TEACHER] = 1
    with fastloss.use_backend(backend):
        stats, argmax = OPS.row_terms(z, None, None, value, None, None, *args)
        q = OPS.row_terms_backward(coef, stats, argmax, z, None, None, value, None, None, *args)
    with fastloss.use_backend("reference"):
        truth, _ = OPS.row_terms(z.double(), None, None, value.double(), None, None, *args)
        p = OPS.row_terms_backward(
            coef.double(), truth, argmax, z.double(), None, None, value.double(), None, None, *args
        )
    torch.testing.assert_close(stats[TermStat.SCORE_MEAN].double(), truth[TermStat.SCORE_MEAN], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.double(), p, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_hard_rows(backend: str, name: str, dtype: torch.dtype) -> None:
    available(backend)
    z, y = (t.cuda() if t.stride(0) else t[:1].cuda().expand(t.shape) for t in hard_rows(name, dtype))
    epilogue = torch.tensor([1.0, 0.1, 0.01, 0.0], device="cuda")[:, None].repeat(1, len(y))
    results = []
    for _ in range(2):
        with fastloss.use_backend(backend):
            results.append(OPS.cross_entropy(z, y, None, None, epilogue)[::2])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)), "two runs differ"
    with fastloss.use_backend("reference"):
        stats, _, dz = OPS.cross_entropy(z.double(), y, None, None, epilogue.double())
    torch.testing.assert_close(results[0][0][:3].double(), stats[:3], rtol=3e-6, atol=3e-6, equal_nan=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][1].double(), dz, rtol=eps + 1e-5, atol=eps * 1e-2 + 1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear(reduction: str, backend: str, dtype: torch.dtype) -> None:
    """Modes C and R against the composition in the same dtype and in fp64."""
    available(backend)
    n, d, v = 300, 192, 5003
    y = torch.randint(0, v, (n,), device="cuda")
    y[::7] = -100
    w = torch.randn(v, d, device="cuda") * d**-0.5
    x = torch.randn(n, d, device="cuda") + 4 * w[y.clamp(min=0)]
    b = torch.randn(v, device="cuda")
    cotangent = torch.rand(n, device="cuda") if reduction == "none" else torch.ones((), device="cuda")
    results = []
    for f, kind in ((fastloss.linear_cross_entropy, dtype), (_composed, dtype), (_composed, torch.float64)):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, w, b)]
        with fastloss.use_backend(backend):
            loss = f(leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction)
            grads = torch.autograd.grad(loss, leaves, cotangent.to(loss.dtype))
        results.append((loss.detach(), *grads))
    check_close(results[0][0], results[1][0], results[2][0], dtype, k=16)
    for ours, torch_own, truth in list(zip(*results, strict=True))[1:]:
        check_gradient(ours, torch_own, truth, dtype, k=16)


def _composed(x: Tensor, w: Tensor, y: Tensor, linear_bias: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(F.linear(x, w, linear_bias), y, reduction=reduction)


# A step of training on both functions: what make_operands and step take besides.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "class weight": ({"weighted": True}, {}),
    "class weight, smoothing, float16": ({"weighted": True, "dtype": torch.float16}, {"label_smoothing": 0.1}),
    "smoothing and z-loss": ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}),
    "none": ({}, {"reduction": "none"}),
    "none, class weight, z-loss": ({"weighted": True}, {"reduction": "none", "z_loss": 1e-3}),
    "retain_graph": ({}, {"twice": True}),
    "retain_graph, smoothing, float16": ({"dtype": torch.float16}, {"twice": True, "label_smoothing": 0.1}),
}
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]


def make_operands(dtype: torch.dtype = torch.float32, weighted: bool = False) -> Operands:
    x, w = (torch.randn(n, 32, device="cuda") for n in (64, 999))
    x, w = (t.to(dtype).requires_grad_() for t in (x, w * 0.35))
    y = torch.randint(0, 999, (64,), device="cuda")
    y[::7] = -100
    return x, w, y, (torch.rand(999, device="cuda") + 0.5).to(dtype) if weighted else None


def step(operands: Operands, upstream: float = 1.0, twice: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """The loss and the gradients; twice: those of a second backward over the same graph."""
    x, w, y, class_weight = operands
    head = fastloss.linear_cross_entropy(x, w, y, weight=class_weight, **options)
    logits = fastloss.cross_entropy(x @ w.T, y, class_weight, **options)
    loss = (head + logits).sum() * upstream
    if twice:
        torch.autograd.grad(loss, (x, w), retain_graph=True)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def check_step(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """The same up to rounding of the largest value: two backends, and atomics, add in different orders."""
    for a, b in zip(got, want, strict=True):
        error, largest = (a.double() - b.double()).abs().max(), b.double().abs().max()
        assert largest > 0 and error <= (1e-2 if a.dtype == torch.float16 else 1e-4) * largest, (error, largest)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_no_host_sync(backend: str, name: str, upstream: float) -> None:
    """Forward and backward never wait for the device; gradients are right for any upstream."""
    available(backend)
    making, options = STEPS[name]
    operands = make_operands(**making)
    with fastloss.use_backend("reference"):
        want = tuple(t * upstream for t in step(operands, **options))
    with fastloss.use_backend(backend):
        step(operands, upstream, **options)  # what is compiled or allocated once may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = step(operands, upstream, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    check_step(got, want)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_cuda_graph(backend: str, name: str) -> None:
    """Capture once, replay on new data."""
    available(backend)
    making, options = STEPS[name]
    operands = make_operands(**making)
    with fastloss.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(operands, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(operands, **options)
        with torch.no_grad():
            for old, new in zip(operands, make_operands(**making), strict=True):
                if old is not None and new is not None:
                    old.copy_(new)
            operands[2][:20] = -100  # another number of rows to divide by
        graph.replay()
        check_step(captured, step(operands, **options))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_side_stream(backend: str) -> None:
    """Work is queued on the current stream, after what made its input."""
    available(backend)
    side = torch.cuda.Stream()
    y = torch.randint(0, 50000, (512,), device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side), fastloss.use_backend(backend):
        z = torch.zeros(512, 50000, device="cuda")
        for _ in range(20):
            z += 0.1
        z.scatter_(1, y[:, None], 30.0)
        loss = fastloss.cross_entropy(z, y)
    side.synchronize()
    torch.testing.assert_close(loss, F.cross_entropy(z, y))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_bad_targets_become_nan_and_read_nothing(backend: str) -> None:
    available(backend)
    z = torch.randn(4, 1000, device="cuda", requires_grad=True)
    y = torch.tensor([1, 1000, -1, 2**40], device="cuda")
    with fastloss.use_backend(backend):
        loss = fastloss.cross_entropy(z, y, reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isnan().tolist() == [False, True, True, True]
    assert g.isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_compile_and_second_backward(backend: str) -> None:
    available(backend)
    x, w = (
        torch.randn(64, 32, device="cuda", requires_grad=True),
        torch.randn(999, 32, device="cuda", requires_grad=True),
    )
    y = torch.randint(0, 999, (64,), device="cuda")
    torch._dynamo.reset()
    f = torch.compile(lambda x, w: fastloss.linear_cross_entropy(x, w, y), fullgraph=True)
    with fastloss.use_backend(backend):
        for loss in (f(x, w), fastloss.linear_cross_entropy(x, w, y)):
            first = torch.autograd.grad(loss, (x, w), retain_graph=True)
            for a, b in zip(first, torch.autograd.grad(loss, (x, w)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_more_than_2_to_the_31_logits(backend: str) -> None:
    available(backend)
    n, v = 20000, 128256
    z = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(0, v, (n,), device="cuda")
    epilogue = torch.zeros(NUM_EPILOGUES, n, device="cuda")
    epilogue[0] = 1
    with fastloss.use_backend(backend):
        stats, _, dz = OPS.cross_entropy(z, y, None, None, epilogue)
    for part in (slice(0, 4), slice(n - 4, n)):
        with fastloss.use_backend("reference"):
            truth, _, dtruth = OPS.cross_entropy(z[part].double(), y[part], None, None, epilogue[:, part].double())
        torch.testing.assert_close(stats[:3, part].double(), truth[:3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dz[part].double(), dtruth, rtol=8e-3, atol=1e-6)
