"""Arguments that do not fit each other: an error that says what is taken, on every backend, before a kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import quant
from fastloss.quant.surrogates import SurrogateFunction

OPS = torch.ops.fastloss
X, ONE = torch.randn(4, 100), torch.ones(1)
U8 = torch.uint8
PLANES = torch.zeros(1, 4, 64, dtype=U8)
CODES = torch.zeros(4, 4, dtype=U8)
FOUR = torch.ones(4)


def binarize(x: Tensor = X, scale: Tensor | None = None, groups: int = 1, inner: int = 1, kind: int = 1, p0: float = 1.0,
             p1: float = 1.0, save: int = 7) -> Any:  # fmt: skip
    return OPS.binarize(x, None, scale, groups, inner, kind, p0, p1, save)


def backward(grad: Tensor = X, groups: int = 1, inner: int = 1, kind: int = 1, needs: int = 1, **saved: Tensor) -> Any:
    given = (saved.get(name) for name in ("x", "signs", "mask", "codes"))
    return OPS.binarize_backward(grad, *given, None, None, groups, inner, kind, 1.0, 1.0, needs)


def fake_quant(x: Tensor = X, scale: Tensor = ONE, groups: int = 1, inner: int = 1, grad: Tensor | None = None) -> Any:
    quantizer = (scale, None, None, groups, inner, -8.0, 7.0, 1.0, 0.0, False)
    return OPS.fake_quant(x, *quantizer) if grad is None else OPS.fake_quant_backward(grad, x, *quantizer, 7)


def quantize(x: Tensor = X[0], group: int = 4, bits: int = 8, **given: Tensor) -> Any:
    return OPS.quantize_groups(x, group, bits, given.get("low"), given.get("high"), given.get("seed"))


def dequantize(n: int = 16, group: int = 4, bits: int = 8, codes: Tensor = CODES, low: Tensor = FOUR, step: Tensor = FOUR,
               dtype: torch.dtype = torch.float32) -> Any:  # fmt: skip
    return OPS.dequantize_groups(codes, low, step, n, group, bits, dtype)


def pack(
    x: Tensor = X, kind: int = 2, scale: Tensor | None = None, group: int = 0, low: int = 0, planes: int = 2
) -> Any:
    return OPS.pack_bits(x, kind, None, scale, group, low, planes)


def unpack(planes: Tensor = PLANES, columns: int = 100, weights: tuple[int, ...] = (2,), scale: Tensor | None = None,
           group: int = 0) -> Any:  # fmt: skip
    return OPS.unpack_bits(planes, columns, list(weights), -1, scale, group, torch.float32)


def of(function: Callable[..., Any], **arguments: Any) -> Callable[[], Any]:
    return lambda: function(**arguments)


WRONG = [
    (of(binarize, kind=7), "surrogate must be 0 to 6, got 7"),
    (of(binarize, kind=-1), "surrogate must be 0 to 6, got -1"),
    (of(binarize, groups=0), "groups and inner must be at least 1"),
    (of(binarize, groups=7, inner=3), "must divide the 400 numbers"),
    (of(binarize, scale=torch.ones(3), groups=4, inner=100), r"1 or 4 numbers, got \[3\]"),
    (of(binarize, x=X[0]), r"2 dimensions, got \[100\]"),
    (of(binarize, x=X.int()), "x must be floating, got torch.int32"),
    (of(binarize, kind=6, p1=1e30), r"terms, must be in \[0, 1000\]"),
    (of(binarize, kind=3, p0=float("nan")), "positive finite number, got nan"),
    (of(binarize, kind=0, save=8), "codes are of a slope that ends somewhere"),
    (of(backward, x=X, kind=99), "surrogate must be 0 to 6, got 99"),
    (of(backward, x=X, groups=7, inner=3), "must divide the 400 numbers"),
    (of(backward, x=X[:2]), r"x must be \[4, 100\], got \[2, 100\]"),
    (of(backward, codes=X), "codes must be torch.uint8, got torch.float32"),
    (of(backward, mask=torch.zeros(4, 64)), "mask must be torch.uint8"),
    (of(backward, mask=torch.zeros(4, 13, dtype=U8)), r"mask must be \[4, 64\], got \[4, 13\]"),
    (of(backward), "got none of them"),
    (of(backward, kind=0, needs=2), "got none of them"),
    (of(fake_quant, grad=torch.ones(1, 2)), r"grad must be \[4, 100\], got \[1, 2\]"),
    (of(fake_quant, scale=torch.ones(0)), "scale must have 1 or 1 numbers"),
    (of(fake_quant, groups=3, inner=7), "must divide the 400 numbers"),
    (of(fake_quant, groups=-3), "groups and inner must be at least 1"),
    (of(quantize, x=X), r"1 dimension, got \[4, 100\]"),
    (of(quantize, group=0), "group must be at least 1"),
    (of(quantize, group=5, bits=4), "even for 4 bits, got 5"),
    (of(quantize, bits=3), "bits must be 4 or 8, got 3"),
    (of(quantize, seed=torch.zeros(1, dtype=torch.int32)), "seed must be torch.int64"),
    (of(quantize, seed=torch.zeros(0, dtype=torch.int64)), r"seed must be \[1\], got \[0\]"),
    (of(quantize, low=ONE), "must both be given, or neither"),
    (of(quantize, low=ONE, high=FOUR), "must have as many numbers"),
    (of(quantize, low=torch.ones(0), high=torch.ones(0)), "must have as many numbers"),
    (of(dequantize, codes=CODES.float()), "codes must be torch.uint8"),
    (of(dequantize, codes=CODES[:1]), r"codes must be \[4, 4\], got \[1, 4\]"),
    (of(dequantize, step=ONE), r"step must be \[4\], got \[1\]"),
    (of(dequantize, n=17), r"n must be 0 to the 4 \* 4 numbers"),
    (of(dequantize, n=-1), r"n must be 0 to the 4 \* 4 numbers"),
    (of(dequantize, bits=3), "bits must be 4 or 8, got 3"),
    (of(pack, kind=9), "kind must be 0"),
    (of(pack, planes=9), "planes of codes must be 1 to 4, got 9"),
    (of(pack, planes=0), "planes of codes must be 1 to 4, got 0"),
    (of(pack, scale=torch.ones(3, 1)), r"scale must be \[4 or 1, 1\], got \[3, 1\]"),
    (of(pack, scale=torch.ones(1, 1), group=-64), "group must be 0"),
    (of(pack, low=1 << 40), r"low must be in \[-128, 127\]"),
    (of(unpack, columns=1000), r"uint8 planes \[1, R, 128\]"),
    (of(unpack, columns=-1000), "columns must be at least 0"),
    (of(unpack, weights=(2, 1)), r"uint8 planes \[2, R, 64\]"),
    (of(unpack, weights=()), "weights must be 1 to 4"),
    (of(unpack, planes=PLANES.float()), "got torch.float32"),
    (of(unpack, scale=torch.ones(2, 1)), r"scale must be \[4 or 1, 1\]"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("call", "words"), WRONG)
def test_what_does_not_fit_is_said(call: Callable[[], Any], words: str, backend: str) -> None:
    with fastloss.use_backend(backend), pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("call", [binarize, of(backward, x=X), fake_quant, of(fake_quant, grad=X), quantize, dequantize,
                                  pack, unpack])  # fmt: skip
def test_what_fits_runs(call: Callable[[], Any]) -> None:
    call()


def test_a_surrogate_made_by_hand_is_checked() -> None:
    for kind, p0, p1, words in (
        (9, 1.0, 0.0, "0 to 6, got 9"),
        (5, 0.0, 0.0, "swish must be a positive"),
        (6, 1.0, 1e9, "terms"),
    ):
        with pytest.raises(ValueError, match=words):
            quant.binarize(X, SurrogateFunction(kind, p0, p1))  # type: ignore[arg-type]


def test_a_parameter_that_is_no_tensor() -> None:
    for call in (lambda: quant.fake_quant(X, 0.5), lambda: quant.binarize(X, scale=0.5)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="scale must be a tensor, got float"):
            call()


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_shapes_known_beforehand_are_those_made(kind: int, planes: int) -> None:
    made, expected = pack(kind=kind, planes=planes), pack(X.to("meta"), kind, planes=planes)
    assert [t.shape for t in made] == [t.shape for t in expected]
