"""`nearest_key` against all distances in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import registry
from fastloss.quant import nearest_key


def brute(x: Tensor, keys: Tensor) -> Tensor:
    """The first least distance of each row, all of them at once."""
    d = (x.double()[:, None] - keys.double()[None]).square().sum(-1)
    return torch.where(d == d.amin(1, keepdim=True), torch.arange(len(keys)), len(keys)).amin(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (7, 3, 5), (70, 4, 16), (130, 257, 33), (64, 5, 1)])
def test_random(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    x, keys = torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype)
    assert torch.equal(nearest_key(x, keys), brute(x, keys))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_backends_agree(backend: str) -> None:
    x, keys = torch.randn(90, 24) + 30, torch.randn(200, 24) + 30
    expected = brute(x, keys)
    if backend == "cpp":
        assert torch.equal(nearest_key(x, keys), expected)
    else:
        with registry.use_backend("reference"):
            assert torch.equal(nearest_key(x, keys), expected)


def test_equal_keys_give_the_lowest_index() -> None:
    keys = torch.randn(9, 12)
    keys = torch.cat((keys, keys, keys))
    x = keys[torch.randperm(27)] + 0.01 * torch.randn(27, 12)
    index = nearest_key(x, keys)
    assert torch.equal(index, brute(x, keys)) and int(index.max()) < 9


def test_all_keys_equal() -> None:
    assert nearest_key(torch.randn(5, 8), torch.randn(1, 8).expand(40, 8)).tolist() == [0] * 5


def test_integers_that_tie_exactly() -> None:
    x, keys = torch.randint(-2, 3, (60, 4)).float(), torch.randint(-2, 3, (50, 4)).float()
    assert torch.equal(nearest_key(x, keys), brute(x, keys))


def test_what_float32_cannot_tell_apart() -> None:
    """Keys on a sphere that differ in the last bits of a long vector: a float32 product ranks them at random."""
    base = torch.randn(1, 64) * 100
    keys = base + 1e-3 * torch.randn(300, 64)
    x = base + 1e-3 * torch.randn(80, 64)
    x = torch.cat((x, keys + 1e-5 * torch.randn(300, 64)))
    naive = (x @ keys.T - keys.square().sum(1) / 2).argmax(1)
    expected = brute(x, keys)
    assert not torch.equal(naive, expected)  # else this test would show nothing
    assert torch.equal(nearest_key(x, keys), expected)


def test_more_near_ties_than_candidates() -> None:
    """Clusters of twenty keys that float32 products cannot rank: none of a list of four need be the nearest."""
    centers = torch.randn(6, 32)
    keys = (centers[:, None] * (1 + 1e-6 * torch.randn(6, 20, 32))).reshape(-1, 32)
    x = (centers[:, None] * (1 + 1e-6 * torch.randn(6, 30, 32))).reshape(-1, 32)
    assert torch.equal(nearest_key(x, keys), brute(x, keys))


def test_mean_far_away() -> None:
    keys, x = torch.randn(64, 16) + 3e4, torch.randn(100, 16) + 3e4
    assert torch.equal(nearest_key(x, keys), brute(x, keys))


@pytest.mark.parametrize("size", [1e25, 1e-20, 1e-22])
def test_numbers_whose_squares_overflow_or_vanish(size: float) -> None:
    keys, x = size * torch.randn(40, 6), size * torch.randn(30, 6)
    assert torch.equal(nearest_key(x, keys), brute(x, keys))


def test_float64_is_not_rounded() -> None:
    keys = torch.tensor([[1.0], [1.0 + 1e-12], [1.0 + 2e-12]], dtype=torch.float64).repeat(3, 1)
    x = torch.tensor([[1.0 + 2e-12], [1.0 + 0.9e-12]], dtype=torch.float64)
    assert nearest_key(x, keys).tolist() == [2, 1]


def test_nan_and_infinity() -> None:
    x, keys = torch.randn(6, 4), torch.randn(8, 4)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    keys[0, 1], keys[5, 0] = torch.nan, -torch.inf
    index = nearest_key(x, keys)
    assert index[[1, 3]].tolist() == [-1, -1]
    rows, left = torch.tensor([0, 2, 4, 5]), torch.tensor([1, 2, 3, 4, 6, 7])
    assert torch.equal(index[rows], left[brute(x[rows], keys[left])])
    assert nearest_key(x, torch.full((3, 4), torch.nan)).tolist() == [-1] * 6


def test_few_finite_keys_among_many() -> None:
    keys = torch.full((20, 3), torch.nan)
    keys[[4, 11]] = torch.randn(2, 3)
    x = torch.randn(30, 3)
    assert torch.equal(nearest_key(x, keys), torch.tensor([4, 11])[brute(x, keys[[4, 11]])])


def test_codebooks_and_layout() -> None:
    x, keys = torch.randn(3, 20, 8), torch.randn(3, 8, 15).transpose(1, 2)
    expected = torch.stack([brute(x[c], keys[c]) for c in range(3)])
    assert torch.equal(nearest_key(x, keys), expected)
    assert torch.equal(nearest_key(x.transpose(1, 2).contiguous().transpose(1, 2), keys), expected)


def test_empty() -> None:
    assert nearest_key(torch.randn(0, 4), torch.randn(3, 4)).shape == (0,)
    assert nearest_key(torch.randn(0, 2, 4), torch.randn(0, 3, 4)).shape == (0, 2)


def test_compiles_and_passes_opcheck() -> None:
    x, keys = torch.randn(12, 8), torch.randn(30, 8)
    torch.library.opcheck(torch.ops.fastloss.nearest_key.default, (x, keys))
    compiled = torch.compile(nearest_key, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, keys), brute(x, keys))


def test_errors() -> None:
    x, keys = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[5, 2\]"):
        nearest_key(x, keys[:, :2])
    with pytest.raises(ValueError, match="at least one key"):
        nearest_key(x, keys[:0])
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[1, 5, 3\]"):
        nearest_key(x, keys[None])
    with pytest.raises(TypeError, match="one dtype"):
        nearest_key(x, keys.double())
    with pytest.raises(TypeError, match=r"floating tensor, got torch\.int64"):
        nearest_key(x.long(), keys.long())
