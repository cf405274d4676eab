"""Each op by itself: registration, every backend against fp64, any forward with any backward, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, reference
from fastloss.contract import NUM_COEFS, NUM_EPILOGUES, Coef, Pointwise, Want
from hard_rows import ROWS, hard_rows

OPS = torch.ops.fastloss
CPU = ("cpp", "reference")
ALL = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.TEMPERED | Want.ARGMAX)


def row_arguments(kind: str, n: int = 9, v: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(logits, target, prob, column_weight, temperature)."""
    logits = (torch.randn(n, v) * 3).to(dtype)
    target = torch.randint(0, v, (n,)) if kind == "ids" else None
    if target is not None and n > 2:
        target[2] = -100
    prob = torch.rand(n, v).softmax(-1).to(dtype) if kind == "probabilities" else None
    return logits, target, prob, torch.rand(v) + 0.5, torch.rand(n) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ids", "probabilities", "none"])
def test_opcheck_rows(kind: str, dtype: torch.dtype) -> None:
    args = row_arguments(kind, dtype=dtype)
    tail = (-100, ALL, 0.7, 3.0)
    torch.library.opcheck(OPS.row_stats.default, (*args, *tail))
    stats, argmax = OPS.row_stats(*args, *tail)
    coef = torch.randn(NUM_COEFS, len(stats[0])).to(stats.dtype)
    torch.library.opcheck(OPS.row_stats_backward.default, (coef, stats, argmax, *args, *tail))
    epilogue = torch.rand(NUM_EPILOGUES, len(stats[0])).to(stats.dtype)
    torch.library.opcheck(OPS.cross_entropy.default, (*args[:4], epilogue, -100, int(Want.SUM), 0.7, 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_linear(dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(9, 6).to(dtype), torch.randn(37, 6).to(dtype), torch.randn(37).to(dtype)
    _, *row = row_arguments("ids", dtype=dtype)
    tail = (-100, ALL, 0.7, 3.0)
    torch.library.opcheck(OPS.linear_row_stats.default, (x, w, bias, *row, *tail, 0))
    stats, argmax = OPS.linear_row_stats(x, w, bias, *row, *tail, 0)
    coef = torch.randn(NUM_COEFS, 9).to(stats.dtype)
    for needs in (7, 1, 2):
        args = (coef, stats, argmax, x, w, bias, *row, *tail, needs, 0)
        torch.library.opcheck(OPS.linear_row_stats_backward.default, args)
    buffer = torch.zeros(37, 6)
    torch.library.opcheck(
        OPS.linear_row_stats_backward_into.default, (coef, stats, argmax, buffer, x, w, bias, *row, *tail, 7, 0)
    )
    epilogue = torch.rand(NUM_EPILOGUES, 9).to(stats.dtype)
    for needs in (7, 1, 2, 0):
        args = (x, w, bias, *row[:3], epilogue, -100, int(Want.SUM), 0.7, 0.0, needs, 0)
        torch.library.opcheck(OPS.linear_cross_entropy.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Pointwise.BCE_WITH_LOGITS, Pointwise.KL_DIV])
def test_opcheck_pointwise(kind: Pointwise, dtype: torch.dtype) -> None:
    x, t, w, p = (
        torch.randn(6, 5).to(dtype),
        torch.rand(6, 5).to(dtype),
        torch.rand(5).to(dtype),
        torch.rand(1).to(dtype),
    )
    for weights in ((None, None), (w, p)):
        given = (x, t, *weights, int(kind))
        for reduce, gradient in ((True, True), (False, False)):
            torch.library.opcheck(OPS.pointwise_loss.default, (*given, 0.5, reduce, gradient))
        for upstream in (torch.tensor(0.5), torch.rand(6, 5)):
            torch.library.opcheck(OPS.pointwise_loss_backward.default, (upstream.to(dtype), *given, 0.5))
        with fastloss.use_backend("reference"):
            args = (torch.zeros_like(x), torch.tensor(0.5), *given, 0.5)
            torch.library.opcheck(OPS.pointwise_loss_backward_unless_one_.default, args)


def close(a: Tensor, b: Tensor, rtol: float) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("softcap, scale", [(0.0, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ids", "probabilities", "none"])
def test_cpp_rows_equal_the_fp64_reference(kind: str, dtype: torch.dtype, softcap: float, scale: float) -> None:
    """Statistics and gradient, with everything asked for, from the same inputs in fp64."""
    for n, v in ((1, 1), (5, 2), (9, 37), (3, 5003)):
        logits, target, prob, weight, temperature = row_arguments(kind, n, v, dtype)
        wide = [None if t is None else t.double() if t.is_floating_point() else t for t in (logits, target, prob)]
        tail = (-100, ALL, scale, softcap)
        with fastloss.use_backend("cpp"):
            stats, argmax = OPS.row_stats(logits, target, prob, weight, temperature, *tail)
        truth, top = OPS.row_stats(*wide, weight.double(), temperature.double(), *tail)
        torch.testing.assert_close(stats.double(), truth, rtol=3e-6, atol=3e-6 * max(1, v**0.5))
        assert torch.equal(argmax, top)
        coef = torch.randn(NUM_COEFS, n)
        if target is None:
            coef[Coef.OWN] = 0 if prob is None else coef[Coef.OWN]
        with fastloss.use_backend("cpp"):
            d = OPS.row_stats_backward(coef, stats, argmax, logits, target, prob, weight, temperature, *tail)
        e = OPS.row_stats_backward(
            coef.double(), truth, top, *wide, weight.double(), temperature.double(), *tail
        )  # fmt: skip
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(d.double(), e, rtol=eps + 5e-6, atol=eps * 0.1 + 1e-5)


@pytest.mark.parametrize("forward, backward", list(itertools.product(CPU, CPU)))
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_any_forward_with_any_backward(kind: str, forward: str, backward: str) -> None:
    args, tail = row_arguments(kind), (-100, ALL, 1.0, 4.0)
    coef = torch.randn(NUM_COEFS, 9)
    with fastloss.use_backend(forward):
        stats, argmax = OPS.row_stats(*args, *tail)
    with fastloss.use_backend(backward):
        dz = OPS.row_stats_backward(coef, stats, argmax, *args, *tail)
    truth = OPS.row_stats_backward(coef.double(), stats.double(), argmax, *(
        None if t is None else t.double() if t.is_floating_point() else t for t in args
    ), *tail)  # fmt: skip
    close(dz, truth, 1e-5)


@pytest.mark.parametrize("forward, backward", list(itertools.product(CPU, CPU)))
def test_any_linear_forward_with_any_backward(forward: str, backward: str) -> None:
    x, w, b = torch.randn(9, 6), torch.randn(37, 6), torch.randn(37)
    _, *row = row_arguments("ids")
    tail, coef = (-100, ALL, 1.0, 4.0), torch.randn(NUM_COEFS, 9)
    with fastloss.use_backend(forward):
        stats, argmax = OPS.linear_row_stats(x, w, b, *row, *tail)
    with fastloss.use_backend(backward):
        grads = OPS.linear_row_stats_backward(coef, stats, argmax, x, w, b, *row, *tail)
    z = torch.nn.functional.linear(x, w, b).double()
    dz = OPS.row_stats_backward(
        coef.double(), stats.double(), argmax, z, row[0], None, row[2].double(), row[3].double(), *tail
    )
    for got, want in zip(grads, (dz @ w.double(), dz.T @ x.double(), dz.sum(0)), strict=True):
        close(got, want, 2e-5)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hard_rows(name: str, dtype: torch.dtype) -> None:
    """DESIGN §3's rows: cpp statistics, gradient and the fused op against the fp64 reference, bit for bit on a second run."""
    logits, target = hard_rows(name, dtype)
    args, tail = (target, None, None), (-100, 0, 1.0, 0.0)
    epilogue = torch.tensor([1.0, 0.1, 0.01, 0.0])[:, None].repeat(1, len(target))
    runs = []
    for _ in range(2):
        with fastloss.use_backend("cpp"):
            stats, _ = OPS.row_stats(logits, *args, None, *tail)
            runs.append((stats, *OPS.cross_entropy(logits, *args, epilogue, *tail)[::2]))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(torch.nan_to_num(first, 7.0), torch.nan_to_num(second, 7.0))
    truth, _ = reference.row_stats(logits.double(), *args, None, *tail)
    close(runs[0][0][:3], truth[:3], 3e-6)
    _, _, dtruth = reference.cross_entropy(logits.double(), *args, epilogue.double(), *tail)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(runs[0][2].double(), dtruth, rtol=eps + 1e-5, atol=eps * 1e-2 + 1e-7, equal_nan=True)


def test_fused_equals_forward_then_backward() -> None:
    for kind in ("ids", "probabilities"):
        logits, target, prob, weight, _ = row_arguments(kind)
        epilogue = torch.rand(NUM_EPILOGUES, 9)
        tail = (-100, int(Want.SUM), 0.8, 3.0)
        stats, argmax, dz = OPS.cross_entropy(logits, target, prob, weight, epilogue, *tail)
        coef = reference.epilogue_coefficients(stats, epilogue, prob is not None)
        close(dz, OPS.row_stats_backward(coef, stats, argmax, logits, target, prob, weight, None, *tail), 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_change_a_bit(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x, w, t = torch.randn(70, 64), torch.randn(3001, 64), torch.randint(0, 3001, (70,))
        torch.set_num_threads(3 - threads)
        other = OPS.row_stats(x @ w.T, t)[0]
        z = x @ w.T
        torch.set_num_threads(threads)
        assert torch.equal(OPS.row_stats(z, t)[0], other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_are_what_users_reach_by_default(dtype: torch.dtype) -> None:
    """Not the reference, and on AVX-512 the fused head, not the chunks."""
    z, x, w, y = (
        torch.randn(4, 9).to(dtype),
        torch.randn(4, 6).to(dtype),
        torch.randn(9, 6).to(dtype),
        torch.randint(0, 9, (4,)),
    )
    assert fastloss.registry.choose("row_stats", z, y) == fastloss.registry.choose("linear_row_stats", x, w) == "cpp"
    head = (x, w, None, y, None, None, torch.zeros(NUM_EPILOGUES, 4))
    assert fastloss.registry.choose("linear_cross_entropy", *head) == "cpp"
    fused = backend_cpp._Head(*head, -100, 0, 1.0, 0.0, 7, 0)
    assert fused.why_not is None or backend_cpp._C.best_isa() < 2, fused.why_not
