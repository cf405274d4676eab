"""CBQ: LoRA-rounding, the loss of a window, outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastloss.quant.recipes import (
    LoraRounding,
    block_windows,
    outlier_threshold,
    reconstruction_loss,
    truncate_outliers,
)


def made(dtype: torch.dtype = torch.float64) -> LoraRounding:
    module = LoraRounding(torch.randn(6, 8, dtype=dtype), torch.rand(6, dtype=dtype) * 0.3 + 0.1, 4, 3)
    with torch.no_grad():
        module.first.normal_(0, 2)
    return module


def test_formula_and_gradients() -> None:
    module = made()
    w, s = module.weight.numpy(), module.scale.numpy()
    v = module.first.detach().numpy() @ module.second.detach().numpy()
    up = np.clip(1 / (1 + np.exp(-v)) * 1.2 - 0.1, 0, 1)
    expected = np.clip(np.floor(w / s) + up, -8, 7) * s
    assert np.allclose(module.up().detach(), up, atol=1e-12)
    assert np.allclose(module().detach(), expected, atol=1e-12)
    assert np.allclose(module.regularizer(3.0).item(), (1 - np.abs(2 * up - 1) ** 3).sum())
    assert np.allclose(module.rounded(), np.clip(np.floor(w / s) + (up >= 0.5), -8, 7) * s, atol=1e-12)
    weight = np.random.default_rng(0).normal(size=(6, 8))
    (module() * torch.from_numpy(weight)).sum().backward()
    inside = (np.floor(w / s) + up >= -8) & (np.floor(w / s) + up <= 7)
    open_ = (up > 0) & (up < 1)
    dv = weight * s * inside * open_ * 1.2 / (1 + np.exp(-v)) / (1 + np.exp(v))
    assert module.first.grad is not None and module.second.grad is not None
    assert np.allclose(module.first.grad, dv @ module.second.detach().numpy().T, atol=1e-10)
    assert np.allclose(module.second.grad, module.first.detach().numpy().T @ dv, atol=1e-10)


def test_starts_between_and_ends_on_levels() -> None:
    module = LoraRounding(torch.randn(5, 7), torch.tensor(0.2), 4, 2)
    assert bool((module.up() == 0.5).all()) and module.regularizer(2.0).item() == 35.0
    levels = module.rounded() / 0.2
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    trained = made()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
    for _ in range(60):
        loss = trained.regularizer(2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 and torch.allclose(trained(), trained.rounded(), atol=0.05)


def test_learned_rounding_beats_nearest() -> None:
    """Correlated inputs: what nearest rounding cannot use."""
    inputs = torch.randn(200, 1) @ torch.randn(1, 16) + 0.1 * torch.randn(200, 16)
    weight, scale = torch.randn(4, 16), torch.tensor(0.7)
    nearest = (weight / scale).round().clamp(-2, 1) * scale
    module = LoraRounding(weight, scale, 2, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    target = inputs @ weight.T
    for step in range(200):
        loss = (inputs @ module().T - target).square().mean()
        if step > 60:
            loss = loss + 0.01 * module.regularizer(4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors = [float((inputs @ w.T - target).square().mean()) for w in (module.rounded(), nearest)]
    assert errors[0] < errors[1]


def test_reconstruction_loss() -> None:
    a = torch.randn(3, 4, 5, dtype=torch.float64)
    b = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = ((a - b) ** 2).sum(-1).mean() + (p * (p / q).log()).sum(-1).mean()
    ours = reconstruction_loss(a, b)
    assert torch.allclose(ours, expected, rtol=1e-12)
    grads = [torch.autograd.grad(loss, b)[0] for loss in (ours, expected)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-10)
    assert float(reconstruction_loss(a, a)) == 0.0


def test_windows() -> None:
    assert list(block_windows(4)) == [range(0, 2), range(1, 3), range(2, 4)]
    assert list(block_windows(5, 3, 0)) == [range(0, 3), range(3, 5)]
    assert list(block_windows(1)) == [range(0, 1)]


def naive_threshold(x: np.ndarray, whisker: float, balance: float) -> float:
    size = np.sort(np.abs(x.ravel()))
    first, third = np.quantile(size, [0.25, 0.75])
    coarse = third + whisker * (third - first)
    found, kept = size[size > coarse], size[size <= coarse]
    if not len(found):
        return float("inf")
    scores = []
    for i in range(len(found)):
        below = found[i - 1] if i else kept[-1]
        scores.append((found[i] - below) ** 2 - balance * (np.var(found[:i]) if i else 0.0))
    i = int(np.argmax(scores))
    return float(found[i - 1] if i else kept[-1])


@pytest.mark.parametrize("balance", [0.0, 1.0, 5.0])
def test_threshold_against_loops(balance: float) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.standard_t(3, size=(20, 17))
        ours = outlier_threshold(torch.from_numpy(x), 1.5, balance)
        assert float(ours) == naive_threshold(x, 1.5, balance)


def test_truncation() -> None:
    x = torch.randn(400)
    x[[3, 90]] = torch.tensor([40.0, -55.0])
    limit = outlier_threshold(x)
    assert float(x.abs().sort().values[-3]) == float(limit)  # both are cut off, nothing else
    assert torch.equal(truncate_outliers(x), x.clamp(-limit, limit))
    even = torch.linspace(-1, 1, 100)
    assert float(outlier_threshold(even)) == float("inf") and torch.equal(truncate_outliers(even), even)
    assert float(outlier_threshold(torch.tensor([2.0]))) == float("inf")


def test_errors() -> None:
    w, s = torch.randn(3, 4), torch.ones(3)
    for arguments, words in (
        ((w[0], s, 4, 1), r"\[R, K\]"), ((w, s[:2], 4, 1), "1 or 3 numbers"), ((w, -s, 4, 1), "numbers > 0"),
        ((w, s, 9, 1), "bits must be 2 to 8, got 9"), ((w, s, 4, 0), "rank must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            LoraRounding(*arguments)
    with pytest.raises(ValueError, match="zeta must be > 1"):
        LoraRounding(w, s, 4, 1, zeta=0.9)
    with pytest.raises(ValueError, match="beta must be > 0"):
        made().regularizer(0)
    with pytest.raises(ValueError, match="alike"):
        reconstruction_loss(w, s)
    with pytest.raises(ValueError, match="overlap < window"):
        list(block_windows(4, 2, 2))
    with pytest.raises(ValueError, match="finite"):
        outlier_threshold(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="whisker and balance"):
        outlier_threshold(w, -1.0)
