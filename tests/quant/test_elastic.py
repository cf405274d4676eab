"""First steps of a quantiser, and one quantiser of many settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("signed", [True, False])
def test_the_search_finds_the_best_of_its_ranges(signed: bool) -> None:
    x = torch.randn(3, 200) ** 3
    scale, offset = searched_scale(x, 3, signed, dim=0, steps=20)

    def loss(s: Tensor, o: Tensor) -> Tensor:
        y = fake_quant(x, s, bits=3, signed=signed, offset=o, dim=0)
        return (y - x).abs().pow(2.4).mean(1)

    best = loss(scale, offset)
    for i in range(1, 21):
        part = i / 20
        if signed:
            other = part * x.abs().amax(1) / 3, torch.zeros(3)
        else:
            other = part * (x.amax(1) - x.amin(1)) / 7, part * x.amin(1)
        assert (best <= loss(*other) * (1 + 1e-5)).all()
    assert (best < 0.9 * loss(*(t for t in (other[0], other[1])))).any()


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
    with pytest.raises(ValueError, match="steps"):
        searched_scale(x, 4, steps=0)
