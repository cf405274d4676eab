"""The discrete key-value bottleneck against loops over rows in float64."""

from __future__ import annotations

import pytest
import torch

from fastloss.quant.recipes import KeyValueBottleneck, kmeans
from fastloss.quant.recipes.chosen_rows import chosen_rows


def made(**options: object) -> KeyValueBottleneck:
    return KeyValueBottleneck(3, 6, 4, 5, generator=torch.Generator().manual_seed(1), **options)  # type: ignore[arg-type]


def test_values_of_the_nearest_keys() -> None:
    module, x = made(), torch.randn(2, 7, 3, 4)
    y, index = module(x), module.nearest(x)
    assert y.shape == (2, 7, 3, 5) and index.shape == (2, 7, 3)
    for a in range(2):
        for b in range(7):
            for c in range(3):
                d = (x[a, b, c].double() - module.keys[c].double()).square().sum(-1)
                assert int(index[a, b, c]) == int(d.argmin())
                assert torch.equal(y[a, b, c], module.values[c, d.argmin()])


def test_gradient_is_of_the_chosen_values_alone() -> None:
    module, x, weight = made(), torch.randn(40, 3, 4), torch.randn(40, 3, 5)
    (module(x) * weight).sum().backward()
    expected = torch.zeros(3, 6, 5, dtype=torch.float64)
    index = module.nearest(x)
    for i in range(40):
        for c in range(3):
            expected[c, index[i, c]] += weight[i, c].double()
    assert module.values.grad is not None
    assert torch.allclose(module.values.grad.double(), expected, atol=1e-5)
    chosen = torch.zeros(3, 6, dtype=torch.bool)
    chosen[torch.arange(3).expand(40, 3), index] = True
    assert not module.values.grad[~chosen].any()


def test_chosen_rows_gradcheck_and_determinism() -> None:
    table, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 4, 4, 2, 0])
    assert torch.autograd.gradcheck(lambda t: chosen_rows(t, index), (table,))
    assert torch.autograd.gradgradcheck(lambda t: chosen_rows(t, index).square(), (table,))
    wide, many, grad = torch.randn(7, 16, requires_grad=True), torch.randint(7, (5000,)), torch.randn(5000, 16)
    first, second = (torch.autograd.grad(chosen_rows(wide, many), wide, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_keys_follow_the_formula() -> None:
    module = made(decay=0.9, eps=1e-3)
    sizes, sums = module.sizes.double(), module.sums.double()
    for _ in range(3):
        x, keys = torch.randn(30, 3, 4), module.keys.double()
        module.update_keys(x)
        for c in range(3):
            count, total = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
            for row in x[:, c].double():
                j = (row - keys[c]).square().sum(1).argmin()
                count[j] += 1
                total[j] += row
            sizes[c], sums[c] = 0.9 * sizes[c] + 0.1 * count, 0.9 * sums[c] + 0.1 * total
            smoothed = (sizes[c] + 1e-3) / (sizes[c].sum() + 6e-3) * sizes[c].sum()
            assert torch.allclose(module.keys[c].double(), sums[c] / smoothed[:, None], rtol=1e-5, atol=1e-6)


def test_dead_keys_become_rows_of_the_batch() -> None:
    module = made(dead_below=0.5)
    module.keys[0, 2] = 1e6  # nothing is near
    module.sizes[0, 2] = 0.01
    x = torch.randn(30, 3, 4)
    module.update_keys(x)
    distance = (x[:, 0] - module.keys[0, 2]).abs().amax(1).min()
    assert float(distance) < 1e-3  # smoothing moves it a little
    assert float(module.sizes[0, 2]) == 1.0
    alive = made()
    alive.keys[0, 2] = alive.sums[0, 2] = 1e6
    alive.update_keys(x)
    assert float(alive.keys[0, 2].min()) > 1e5  # dead_below 0: it stays


def test_kmeans_finds_clusters() -> None:
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centers[:, None] + 0.1 * torch.randn(3, 50, 2)).reshape(-1, 2)
    generator = torch.Generator().manual_seed(5)
    means = kmeans(x, 3, 20, generator)
    inside = (x[:, None] - means[None]).square().sum(-1).amin(1).mean()
    assert means.shape == (3, 2) and torch.isfinite(means).all()
    # a fixed point: each mean is the mean of its own rows
    own = (x.double()[:, None] - means.double()[None]).square().sum(-1).argmin(1)
    for j in own.unique():
        assert torch.allclose(means[j].double(), x[own == j].double().mean(0), atol=1e-5)
    assert float(inside) < float((x - x.mean(0)).square().sum(1).mean())
    assert kmeans(x[:2], 5).shape == (5, 2)


def test_start_keys_sets_the_means() -> None:
    module, x = made(), torch.randn(200, 3, 4)
    module.start_keys(x, 15)
    own = module.nearest(x)
    for c in range(3):
        for j in own[:, c].unique():
            assert torch.isfinite(module.keys[c, j]).all()
    spread = (x - torch.stack([module.keys[c, own[:, c]] for c in range(3)], 1)).square().sum(-1).mean()
    assert float(spread) < 0.7 * float(x.square().sum(-1).mean())
    assert torch.equal(module.sums, module.keys) and bool((module.sizes == 1).all())


def test_callers_tensors_are_untouched_and_state_is_saved() -> None:
    module, x = made(), torch.randn(9, 3, 4)
    before = x.clone()
    module.update_keys(x)
    assert torch.equal(x, before)
    other = made()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, 4\], got \[9, 4\]"):
        made()(torch.randn(9, 4))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        made()(torch.full((1, 3, 4), torch.nan))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        made(decay=1.0)
    with pytest.raises(ValueError, match="keys must be an integer >= 1, got 0"):
        KeyValueBottleneck(1, 0, 2, 2)
    with pytest.raises(ValueError, match="eps must be > 0"):
        made(eps=0.0)
    with pytest.raises(ValueError, match="at least one row"):
        kmeans(torch.randn(0, 3), 2)
