"""R8's table of frequencies in C++: for every histogram the one of `contract.frequencies`, which defines it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloss import registry
from fastloss.compiled import _C
from fastloss.lossless import contract, cpp_r8

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


def compiled(counts: np.ndarray) -> np.ndarray | None:
    freq = np.full(256, 0xA5, np.uint8)
    log2 = np.array(contract.LOG2, np.int32)
    fits = _C.r8_frequencies_cpu(counts=counts.ctypes.data, log2=log2.ctypes.data, frequencies=freq.ctypes.data)
    return freq if fits else None


def check(counts: list[int] | np.ndarray) -> None:
    counts = np.asarray(counts, np.int64)
    got = compiled(counts)
    assert got is not None and np.array_equal(got, contract.frequencies(counts))


def at(places: dict[int, int]) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    counts[list(places)] = list(places.values())
    return counts


def test_named_histograms():
    check(np.zeros(256))
    for s in (0, 37, 255):
        check(at({s: 1}))
        check(at({s: (1 << 38) - 1}))
        check(at({s: 5, 255 - s: 5}))
    for count in (1, 2, 1000):
        check(np.full(256, count))
    check(np.arange(256))
    check(np.arange(256)[::-1] + 1)
    check([1 << i // 8 for i in range(256)])
    check([(1 << 37) // (i + 1) ** 3 for i in range(256)])  # costs of 2^61
    check(np.full(256, (1 << 30) - 1))


@pytest.mark.parametrize(("many", "count", "few", "kept"), [(6, 170, 21, 27), (59, 19, 20, 59)])
def test_when_the_search_ends(many, count, few, kept):
    """Seven symbols in vain are not the end, eight are: then the rare ones stay escaped, though all of them would pay."""
    counts = at({s: count if s < many else 1 for s in range(many + few)})
    check(counts)
    assert np.count_nonzero(contract.frequencies(counts)) == kept


def test_gains_fall():
    """Why exchanging slots ends where dealing them out does: a symbol's next slot always gains less than its last."""
    steps = np.diff(contract.LOG2[1:])
    assert (np.diff(steps) < 0).all()


@settings(max_examples=150, deadline=None)
@given(
    symbols=st.integers(1, 256), limit=st.sampled_from([1, 2, 3, 10, 1000, 1 << 20, (1 << 30) - 1]),
    skew=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 9.0]), seed=st.integers(0, 1 << 32),
)  # fmt: skip
def test_any_histogram(symbols, limit, skew, seed):
    """Few and many symbols, ties, falling powers and huge counts."""
    random = np.random.default_rng(seed)
    counts = np.zeros(256, np.int64)
    counts[random.permutation(256)[:symbols]] = (
        random.integers(0, limit + 1, symbols) / np.arange(1, symbols + 1) ** skew
    )
    check(counts)


def test_what_does_not_fit_goes_to_the_definition():
    for counts in (at({3: 1 << 38}), np.full(256, 1 << 31), at({3: -1, 4: 9})):
        assert compiled(counts) is None
    counts = at({3: 1 << 50, 4: 1 << 49, 9: 7})
    assert torch.equal(cpp_r8.frequencies(torch.from_numpy(counts)), torch.from_numpy(contract.frequencies(counts)))


def test_the_definition_is_what_the_reference_uses(monkeypatch):
    counts = torch.from_numpy(at({3: 6, 4: 5}))
    want = cpp_r8.frequencies(counts)
    monkeypatch.setattr(contract, "frequencies", lambda counts: np.zeros(256, np.uint8))
    assert torch.equal(cpp_r8.frequencies(counts), want)
    with registry.use_backend("reference"):
        assert not cpp_r8.frequencies(counts).any()
