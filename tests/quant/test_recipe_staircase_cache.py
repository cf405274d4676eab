"""The staircase cache of keys and values against a plain quantiser in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss.quant.recipes import StaircaseCache


def rounded(x: Tensor, group: int, bits: int) -> Tensor:
    """Groups of neighbours of the last dimension, min and max, in float64."""
    g = x.double().reshape(*x.shape[:-1], -1, group)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = torch.where(step > 0, ((g - low) / step).round(), 0.0)
    return (low + codes * step).reshape(x.shape)


def staircase(x: Tensor, bits: tuple[int, ...], chunk: int, group: int) -> Tensor:
    """[..., T, E], groups of channels; every chunk through all steps down to its own."""
    whole = x.shape[-2] // chunk
    parts = []
    for c in range(whole):
        part = x[..., c * chunk : (c + 1) * chunk, :].double()
        for b in bits[: min(whole - c, len(bits))]:
            part = rounded(part, group, b)
        parts.append(part)
    return torch.cat([*parts, x[..., whole * chunk :, :].double()], -2)


def keys_staircase(x: Tensor, bits: tuple[int, ...], chunk: int, group: int) -> Tensor:
    whole = x.shape[-2] // chunk
    parts = []
    for c in range(whole):
        part = x[..., c * chunk : (c + 1) * chunk, :].transpose(-1, -2).double()
        for b in bits[: min(whole - c, len(bits))]:
            part = rounded(part, group, b)
        parts.append(part.transpose(-1, -2))
    return torch.cat([*parts, x[..., whole * chunk :, :].double()], -2)


@pytest.mark.parametrize("bits", [(8,), (8, 4), (8, 4, 2), (4, 2, 1), (8, 4, 2, 1)])
def test_against_float64(bits: tuple[int, ...]) -> None:
    keys, values = torch.randn(2, 3, 75, 12), torch.randn(2, 3, 75, 16)
    cache = StaircaseCache(bits, chunk=16, group=8)
    for start in range(0, 75, 10):
        cache.append(keys[:, :, start : start + 10], values[:, :, start : start + 10])
    assert len(cache) == 75
    whole = 75 // 16
    assert cache.chunk_bits == [bits[min(whole - c, len(bits)) - 1] for c in range(whole)]
    k, v = cache.read()
    for ours, expected in ((k, keys_staircase(keys, bits, 16, 8)), (v, staircase(values, bits, 16, 8))):
        # float32 may round a number that lies half way between two levels to the other one
        far = (ours.double() - expected).abs() > 1e-4
        assert float(far.double().mean()) < 2e-3
    assert torch.equal(k[:, :, 64:], keys[:, :, 64:]) and torch.equal(v[:, :, 64:], values[:, :, 64:])


def test_error_is_half_a_step_of_each() -> None:
    values = torch.randn(1, 64, 32)
    cache = StaircaseCache((8, 4), chunk=32, group=32)
    cache.append(values, values)
    _, got = cache.read()
    span = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    error = (got - values).abs()
    assert bool((error[:, 32:] <= span[:, 32:] / 510 * 1.001).all())
    assert bool((error[:, :32] <= span[:, :32] * (1 / 510 + 1 / 30) * 1.001).all())


def test_one_append_or_many_are_the_same() -> None:
    keys, values = torch.randn(100, 8), torch.randn(100, 8)
    one, many = (StaircaseCache((8, 4, 2), chunk=16, group=8) for _ in range(2))
    one.append(keys, values)
    for t in range(100):
        many.append(keys[t : t + 1], values[t : t + 1])
    assert all(torch.equal(a, b) for a, b in zip(one.read(), many.read(), strict=True))
    assert one.chunk_bits == many.chunk_bits == [2, 2, 2, 2, 4, 8]


def test_bytes_and_dtype() -> None:
    x = torch.randn(4, 1024, 64, dtype=torch.bfloat16)
    cache = StaircaseCache((4, 2, 1), chunk=64, group=64)
    cache.append(x, x)
    # 14 chunks of 1 bit, one of 2, one of 4, and 8 bytes a group of 64; nothing is recent
    numbers = 2 * 4 * 64 * 64
    assert cache.nbytes == numbers * (14 * 1 + 2 + 4) // 8 + 8 * 16 * numbers // 64
    assert cache.nbytes < x.nbytes * 2 / 5
    assert all(t.dtype == torch.bfloat16 for t in cache.read())


def test_what_is_read_is_not_shared() -> None:
    keys = torch.randn(5, 8)
    cache = StaircaseCache((8,), chunk=8, group=8)
    cache.append(keys, keys)
    kept = keys.clone()
    keys.zero_()
    cache.read()[0].zero_()
    assert torch.equal(cache.read()[0], kept)


def test_constant_and_empty_appends() -> None:
    cache = StaircaseCache((8, 4, 2), chunk=8, group=8)
    cache.append(torch.full((25, 8), 3.0), torch.full((25, 8), -2.0))
    cache.append(torch.zeros(0, 8), torch.zeros(0, 8))
    k, v = cache.read()
    assert bool((k == 3).all()) and bool((v == -2).all()) and len(cache) == 25


def test_errors() -> None:
    for arguments, words in (
        (((4, 8),), "bits must fall"), (((),), "bits must fall"), (((3,),), "each one of"),
        (((8,), 30, 8), "divide chunk"), (((8,), 12, 12), "multiple of 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            StaircaseCache(*arguments)
    cache = StaircaseCache((8,), chunk=8, group=8)
    with pytest.raises(ValueError, match="empty"):
        cache.read()
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="multiple of 8 channels, got 5"):
        cache.append(x, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"got \[3, 8\] and \[2, 8\]"):
        cache.append(x, x[:2])
    with pytest.raises(TypeError, match="keys must be floating"):
        cache.append(x.long(), x)
    cache.append(x, x)
    with pytest.raises(ValueError, match="the cache holds"):
        cache.append(x.double(), x.double())
    with pytest.raises(ValueError, match="the cache holds"):
        cache.append(torch.randn(3, 9), x)
    assert len(cache) == 3
