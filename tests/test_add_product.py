"""dW over chunks of rows: the bf16 kernel against float64, at both of its instruction sets."""

from __future__ import annotations

import pytest
import torch

from fastloss import add_product
from fastloss.extension import _C


@pytest.fixture(params=[3, 4], ids=["avx512bf16", "amx"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the compiled extension is missing" if _C is None else _C.add_product_why_not(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(add_product, "ISA", request.param)


@pytest.mark.parametrize("n, v, d", [(1, 1, 1), (5, 37, 33), (70, 101, 200), (256, 64, 96), (33, 32, 31)])
def test_sums(isa: None, n: int, v: int, d: int) -> None:
    a, b = torch.randn(n, v + 3).bfloat16()[:, 1 : v + 1], torch.randn(n, d + 2).bfloat16()[:, 2:]
    total = torch.randn(v, d)
    product = a.double().T @ b.double()
    size = a.double().abs().T @ b.double().abs() + total.abs()
    assert add_product.takes(total, a, b)
    for first in (False, True):
        start = torch.full_like(total, torch.nan) if first else total.clone()
        truth = product if first else product + total.double()
        rounded = torch.empty(v, d, dtype=torch.bfloat16)
        before = start.clone()
        add_product.add_product(start, a, b, first, rounded)
        assert torch.equal(start.nan_to_num(7.0), before.nan_to_num(7.0))
        add_product.add_product(start, a, b, first)
        assert ((start - truth).abs() <= 2e-6 * size).all()
        assert torch.equal(rounded, start.bfloat16())


def test_thread_count_does_not_change_a_bit(isa: None) -> None:
    a, b, before, results = torch.randn(70, 300).bfloat16(), torch.randn(70, 65).bfloat16(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            total = torch.ones(300, 65)
            add_product.add_product(total, a, b, False)
            results.append(total)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_not_a_number_stays_in_its_column(isa: None) -> None:
    a, b = torch.randn(40, 64).bfloat16(), torch.randn(40, 32).bfloat16()
    a[3, 7] = torch.nan
    total = torch.zeros(64, 32)
    add_product.add_product(total, a, b, True)
    assert total[7].isnan().all() and total[torch.arange(64) != 7].isfinite().all()


def test_what_is_refused() -> None:
    a, b, total = torch.randn(4, 8).bfloat16(), torch.randn(4, 6).bfloat16(), torch.zeros(8, 6)
    assert not add_product.takes(total, a.float(), b.float())
    assert not add_product.takes(total.T.contiguous().T, a, b)
    assert not add_product.takes(total, a.T.contiguous().T, b)
    with pytest.raises(ValueError, match=r"total \(7, 6\)"):
        add_product.add_product(total[:7], a, b, True)
