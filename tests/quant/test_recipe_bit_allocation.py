"""BAQ's levels and GPTQ's pass against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss.quant.recipes import allocate_levels, gptq_columns


def test_levels_are_the_published_formula() -> None:
    losses = torch.rand(50, dtype=torch.float64) ** 4 + 1e-6
    arithmetic, geometric = losses.mean(), losses.log().mean().exp()
    r = geometric / arithmetic
    for bits in (2.0, 3.0, 4.5):
        found = allocate_levels(losses, bits)
        for j, loss in enumerate(losses):
            raw = ((loss / (r * arithmetic)) * 2 ** (1.95 * bits)) ** (1 / 1.95)
            assert int(found[j]) == round(max(1.0, float(raw)))
    many = allocate_levels(losses.clamp(min=0.01), 6.0)
    assert abs(float(many.double().log2().mean()) - 6.0) < 0.01  # no column is at the floor: the mean is kept


def test_halving_a_loss() -> None:
    levels = allocate_levels(torch.tensor([1.0, 0.25]), 8.0).double().log2()
    assert abs(float(levels[0] - levels[1]) - 2 / 1.95) < 0.01


def test_columns_without_loss() -> None:
    assert allocate_levels(torch.tensor([0.0, 1.0, 1.0]), 3).tolist() == [1, 8, 8]
    assert allocate_levels(torch.zeros(3), 3).tolist() == [1, 1, 1]


def loops(weight: torch.Tensor, hessian: torch.Tensor, levels: list[int]) -> tuple[torch.Tensor, list[float]]:
    """Each column: the rest is set to what is best for the quadratic form given the columns so far (the definition)."""
    w0, h, n = weight.double(), hessian.double(), weight.shape[1]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    w, losses = w0.clone(), []
    for j in range(n):
        low, high = w[:, j].min(), w[:, j].max()
        step = (high - low) / (levels[j] - 1) if levels[j] > 1 else None
        q = w[:, j].mean().expand(len(w)) if step is None else low + step * ((w[:, j] - low) / step).round()
        rest = h[j:, j:].inverse()
        error = w[:, j] - q
        losses.append(float((error**2).sum() / rest[0, 0] / 2))
        # the inverse of the remaining Hessian gives the update of Optimal Brain Surgeon
        w[:, j:] = w[:, j:] - error[:, None] / rest[0, 0] * rest[0]
        w[:, j] = q
    return w, losses


@pytest.mark.parametrize("levels", [[4] * 6, [1, 2, 3, 9, 16, 5]])
def test_gptq_pass(levels: list[int]) -> None:
    inputs = torch.randn(40, 6) @ torch.randn(6, 6)
    weight, hessian = torch.randn(8, 6, dtype=torch.float64), (inputs.T @ inputs).double()
    before = weight.clone()
    rounded, losses = gptq_columns(weight, hessian, torch.tensor(levels))
    expected, cost = loops(weight, hessian, levels)
    assert torch.allclose(rounded, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(losses, torch.tensor(cost, dtype=torch.float64), rtol=1e-8)
    assert torch.equal(weight, before)
    assert all(len(rounded[:, j].unique()) <= levels[j] for j in range(6))


def test_allocation_lowers_the_output_error() -> None:
    scales = torch.logspace(-1.5, 1.5, 24)
    inputs, weight = torch.randn(400, 24) * scales, torch.randn(32, 24)
    hessian = inputs.T @ inputs
    uniform, losses = gptq_columns(weight, hessian, 2**3)
    levels = allocate_levels(losses, 3)
    dealt, _ = gptq_columns(weight, hessian, levels)
    errors = [float(((w - weight) @ inputs.T).square().sum()) for w in (uniform, dealt)]
    assert float(levels.double().log2().mean()) < 3.2
    assert errors[1] < 0.8 * errors[0]


def test_dtype_and_constant_columns() -> None:
    weight = torch.cat((torch.full((5, 1), 2.0), torch.randn(5, 2)), 1).half()
    rounded, losses = gptq_columns(weight, torch.eye(3), 4)
    assert rounded.dtype == torch.half and float(losses[0]) == 0.0 and torch.equal(rounded[:, 0], weight[:, 0])
    assert math.isfinite(float(losses.sum()))
    assert gptq_columns(torch.randn(0, 3), torch.eye(3), 4)[0].shape == (0, 3)


def test_errors() -> None:
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match="finite and >= 0"):
        allocate_levels(torch.tensor([1.0, -1.0]), 3)
    with pytest.raises(ValueError, match="bits and slope must be > 0, got 0"):
        allocate_levels(torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"hessian \[K, K\]"):
        gptq_columns(weight, torch.eye(4), 4)
    with pytest.raises(ValueError, match="3 integers >= 1"):
        gptq_columns(weight, torch.eye(3), torch.tensor([4, 0, 4]))
    with pytest.raises(ValueError, match="positive definite"):
        gptq_columns(weight, -torch.eye(3), 4)
    with pytest.raises(ValueError, match="damp must be >= 0"):
        gptq_columns(weight, torch.eye(3), 4, damp=-1.0)
    with pytest.raises(TypeError, match="weight must be floating"):
        gptq_columns(weight.long(), torch.eye(3), 4)
