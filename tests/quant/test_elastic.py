"""First steps of a quantiser, and one quantiser of many settings."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss.quant import ElasticQuantizer, absmax_scale, fake_quant, lsq_scale, minmax_scale, searched_scale


def test_first_steps() -> None:
    x = torch.randn(6, 40)
    torch.testing.assert_close(lsq_scale(x, 4), (2 * x.abs().mean() / math.sqrt(7)).reshape(1))
    torch.testing.assert_close(lsq_scale(x, 4, signed=False, dim=0), 4 * x.abs().mean(1) / math.sqrt(15))
    torch.testing.assert_close(lsq_scale(x, 4, dim=-1), 2 * x.abs().mean(0) / math.sqrt(7))
    torch.testing.assert_close(lsq_scale(x, 4, group=10), 2 * x.abs().reshape(24, 10).mean(1) / math.sqrt(7))
    torch.testing.assert_close(absmax_scale(x, 3, dim=0), x.abs().amax(1) / 3)
    torch.testing.assert_close(absmax_scale(x, 2, "seq", dim=0), x.abs().amax(1))
    images = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(absmax_scale(images, 3, dim=1), images.abs().amax((0, 2, 3)) / 3)
    scale, offset = minmax_scale(x, 2, dim=0)
    torch.testing.assert_close((scale, offset), ((x.amax(1) - x.amin(1)) / 3, x.amin(1)))
    y = fake_quant(x, scale, bits=2, signed=False, offset=offset, dim=0)
    torch.testing.assert_close(y.aminmax(dim=1), x.aminmax(dim=1))
    assert (absmax_scale(torch.zeros(3), 4) > 0).all() and fake_quant(torch.zeros(3), lsq_scale(torch.zeros(3), 4)).eq(
        0
    ).all()
    assert lsq_scale(x.bfloat16(), 4).dtype == torch.float32 and lsq_scale(x.double(), 4).dtype == torch.float64


@pytest.mark.parametrize(("signed", "dim"), [(True, None), (False, None), (True, 1), (False, 1)])
@pytest.mark.parametrize(("candidates", "shrink", "power"), [(80, 0.01, 2.4), (7, 0.1, 0.5)])
def test_the_search_finds_the_best_of_its_ranges(
    signed: bool, dim: int | None, candidates: int, shrink: float, power: float
) -> None:
    x = torch.randn(7, 3, dtype=torch.float64) ** 3
    scale, offset = searched_scale(x, 3, signed, dim, power=power, candidates=candidates, shrink=shrink)
    for r, row in enumerate([x.flatten()] if dim is None else list(x.T)):
        costs = []
        for i in range(candidates):
            left = 1 - i * shrink
            s = left * (row.abs().max() / 3 if signed else (row.max() - row.min()) / 7)
            beta = 0.0 if signed else left * row.min()
            again = ((row - beta) / s).clamp(-4 if signed else 0, 3 if signed else 7).round() * s + beta
            costs.append((float((row - again).abs().pow(power).sum()), float(s), float(beta)))
        best = min(costs)
        assert abs(best[1] - float(scale[r])) < 1e-9 and abs(best[2] - float(offset[r])) < 1e-9


def test_every_setting_has_its_own_parameters() -> None:
    x = torch.randn(6, 16)
    quantizer = ElasticQuantizer(x, bits=(2, 4, 8), granularity=("tensor", "row", "group"), group=8)
    assert len(quantizer.scales) == 18 and len(quantizer.offsets) == 9
    errors = []
    for granularity, count in (("tensor", 1), ("row", 6), ("group", 12)):
        for bits in (2, 4, 8):
            for symmetric in (True, False):
                quantizer.zero_grad()
                y = quantizer(x, bits, symmetric, granularity)
                scale, offset = quantizer.parameters_of(bits, symmetric, granularity)
                assert scale.numel() == count and (offset is None) == symmetric
                y.square().sum().backward()
                moved = [name for name, p in quantizer.named_parameters() if p.grad is not None]
                assert len(moved) == (1 if symmetric else 2)
                where = {"tensor": {}, "row": {"dim": 0}, "group": {"group": 8}}[granularity]
                torch.testing.assert_close(y, fake_quant(x, scale, bits=bits, signed=symmetric, offset=offset, **where))
                errors.append((y - x).abs().max().item())
    assert all(a > b > c for a, b, c in (errors[i::2][j : j + 3] for i in range(2) for j in (0, 3, 6)))
    again = ElasticQuantizer(torch.randn(6, 16), bits=(2, 4, 8), granularity=("tensor", "row", "group"), group=8)
    again.load_state_dict(quantizer.state_dict())
    torch.testing.assert_close(again(x, 4, False, "group"), quantizer(x, 4, False, "group"))


def test_a_step_below_zero_is_its_magnitude() -> None:
    x = torch.randn(50)
    quantizer = ElasticQuantizer(x, bits=(4,), symmetric=(True,), granularity=("tensor",), search=True)
    before = quantizer(x, 4)
    scale, _ = quantizer.parameters_of(4, True, "tensor")
    with torch.no_grad():
        scale.neg_()
    torch.testing.assert_close(quantizer(x, 4), before)


def test_errors() -> None:
    x = torch.randn(4, 6)
    for words, options in (
        ("bits", {"bits": (9,)}), ("bits", {"bits": ()}), ("granularity", {"granularity": ("channel",)}),
        ("group", {"granularity": ("group",)}), ("symmetric", {"symmetric": ()}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ElasticQuantizer(x, **options)  # type: ignore[arg-type]
    quantizer = ElasticQuantizer(x, bits=(4,), granularity=("tensor",))
    with pytest.raises(ValueError, match="no setting"):
        quantizer(x, 5)
    with pytest.raises(ValueError, match="no setting"):
        quantizer(x, 4, True, "row")
    with pytest.raises(ValueError, match="hold a number"):
        lsq_scale(torch.empty(0), 4)
    with pytest.raises(TypeError, match="floating"):
        lsq_scale(torch.ones(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="mode must be"):
        absmax_scale(x, 4, "affine")
    for wrong, words in (({"candidates": 0}, "leave a range"), ({"candidates": 11, "shrink": 0.1}, "leave a range"),
                         ({"power": 0}, "power must be > 0"), ({"dim": 2}, "dim must be")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            searched_scale(x, 4, **wrong)  # type: ignore[arg-type]
    assert searched_scale(torch.zeros(4), 4)[0] > 0 and not searched_scale(torch.zeros(4), 4, False)[1].any()
