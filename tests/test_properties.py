"""Properties that hold for any input (hypothesis)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastloss

settings.register_profile("fastloss", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("fastloss")

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 300))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def rows(shape: tuple[int, int], dtype: torch.dtype, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(shape, generator=g) * scale).to(dtype)
    return z, torch.randint(0, shape[1], shape[:1], generator=g)


@given(SHAPES, DTYPES, st.integers(0, 10**6))
def test_gradient_rows_sum_to_zero_and_loss_is_not_negative(
    shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    z, y = rows(shape, dtype, seed)
    z.requires_grad_()
    loss = fastloss.cross_entropy(z, y, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), z)
    assert (loss >= 0).all()
    assert (g.double().sum(1).abs() <= 4 * torch.finfo(dtype).eps * g.double().abs().sum(1) + 1e-7).all()


@given(SHAPES, st.integers(0, 10**6), st.integers(-2048, 2048))
def test_an_offset_changes_nothing(shape: tuple[int, int], seed: int, offset: int) -> None:
    z, y = rows(shape, torch.float32, seed)
    z = (z * 256).round() / 256  # so that adding the offset is exact
    torch.testing.assert_close(
        fastloss.cross_entropy(z + offset, y), fastloss.cross_entropy(z, y), rtol=2e-6, atol=1e-6
    )


@given(SHAPES, st.integers(0, 10**6))
def test_permuting_classes_and_rows(shape: tuple[int, int], seed: int) -> None:
    z, y = rows(shape, torch.float32, seed)
    classes, order = torch.randperm(shape[1]), torch.randperm(shape[0])
    moved = fastloss.cross_entropy(z[order][:, classes], torch.argsort(classes)[y[order]], reduction="none")
    torch.testing.assert_close(moved, fastloss.cross_entropy(z, y, reduction="none")[order], rtol=2e-6, atol=1e-6)


@given(SHAPES, st.integers(0, 10**6), st.floats(0, 1))
def test_label_smoothing_is_linear(shape: tuple[int, int], seed: int, e: float) -> None:
    z, y = rows(shape, torch.float32, seed)
    at = [fastloss.cross_entropy(z, y, label_smoothing=s) for s in (0.0, e, 1.0)]
    torch.testing.assert_close(at[1], (1 - e) * at[0] + e * at[2], rtol=3e-6, atol=3e-6)


@given(SHAPES, DTYPES, st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.2]))
@settings(max_examples=150)
def test_equal_to_torch_in_fp64(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, soft: bool, weighted: bool, smoothing: float
) -> None:
    z, y = rows(shape, dtype, seed)
    y = torch.rand(shape).softmax(-1) if soft else y
    w = torch.rand(shape[1]).add(0.1).to(dtype) if weighted else None
    ours = fastloss.cross_entropy(z, y, w, label_smoothing=smoothing, reduction="sum")
    wide = y.double() if soft else y
    theirs = F.cross_entropy(
        z.double(), wide, None if w is None else w.double(), label_smoothing=smoothing, reduction="sum"
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(ours.dtype).eps + 3e-6, atol=1e-4)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 40), st.integers(0, 10**6), st.integers(1, 64))
def test_chunks_do_not_change_the_result(n: int, v: int, d: int, seed: int, kib: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(s, generator=g, requires_grad=True) for s in ((n, d), (v, d)))
    y = torch.randint(0, v, (n,), generator=g)
    whole = fastloss.linear_cross_entropy(x, w, y)
    parts = fastloss.linear_cross_entropy(x, w, y, max_extra_bytes=kib * 1024)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(parts, (x, w)), torch.autograd.grad(whole, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 4), st.integers(2, 20), st.integers(2, 60), st.integers(0, 10**6))
def test_shift_equals_slicing(batch: int, length: int, v: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(batch, length, 8, generator=g), torch.randn(v, 8, generator=g)
    y = torch.randint(0, v, (batch, length), generator=g)
    ours = fastloss.linear_cross_entropy(x, w, y, shift=True)
    theirs = F.cross_entropy((x[:, :-1] @ w.T).flatten(0, 1), y[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
