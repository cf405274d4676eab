"""Signs with a surrogate's gradient, and packing: the cases of test_quant_binarize.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import common
from common import Group
from fastloss import quant
from implementations import CASES, Call, Case, compiled, ours
from quantisers import step


def _reste(x: Tensor) -> Tensor:
    size = x.abs()
    curve = torch.where(size <= 0.1, 0.1 ** (1 / 3) / 0.1, size.pow(-2 / 3) / 3)
    return torch.where(size <= 1.5, curve, 0.0)


#: The slope of each surrogate in PyTorch operations, as repositories write it.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda x: (x.abs() < 1).to(x.dtype),
    "approx": lambda x: (2 - 2 * x.abs()).clamp(min=0),
    "reste": _reste,
    "swish": lambda x: 5 * (2 - 5 * x * torch.tanh(2.5 * x)) / (1 + torch.cosh(5 * x)),
    "fda": lambda x: torch.where(
        x.abs() <= 1, 0.4 / math.pi * sum(torch.cos((2 * i + 1) * 0.1 * x) for i in range(10)), 0.0
    ),
    "biper": lambda x: 20 * torch.cos(20 * x),
}


def _function(surrogate: str) -> Callable[[Tensor], Tensor]:
    slope = SLOPES[surrogate]

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.where((torch.sin(20 * x) if surrogate == "biper" else x) >= 0, 1.0, -1.0).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * slope(*ctx.saved_tensors)

    return Sign.apply


def binarize(group: Group) -> Case:
    """Forward and backward of a mode "surrogate" or "surrogate u8", which saves 8 bits a number instead of it."""
    surrogate, _, u8 = group.mode.partition(" ")
    x, _ = common.logits(group)
    x = (x / 2).requires_grad_()
    grad, eager = torch.randn_like(x), _function(surrogate)
    fast = compiled(lambda x: eager(x) * 1.0)
    calls = {
        "torch": step(lambda: eager(x), grad, x),
        "torch_compile": step(lambda: fast(x), grad, x),
        **ours(group.device, step(lambda: quant.binarize(x, surrogate, save=u8 or "auto"), grad, x)),
    }
    kept = 2 * x.numel() if u8 else x.numel() // 4 if surrogate == "clip" else x.nbytes  # written and read, or read
    return Case(calls, (x,), 4 * x.nbytes + kept, 0, gradient_bytes=x.nbytes, logits_bytes=x.nbytes)


def _packed(x: Tensor) -> Tensor:
    weights = 2 ** torch.arange(8, device=x.device, dtype=torch.uint8)
    return ((x >= 0).to(torch.uint8).reshape(x.shape[0], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def _unpacked(bits: Tensor, dtype: torch.dtype) -> Tensor:
    ones = bits[..., None] >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    return ones.flatten(1).to(dtype) * 2 - 1


def pack_bits(group: Group) -> Case:
    """Signs to bits, or mode "back"."""
    x, _ = common.logits(group)
    bits, plain = quant.pack_bits(x), _packed(x)
    back = group.mode == "back"
    eager = (lambda: _unpacked(plain, x.dtype)) if back else (lambda: _packed(x))
    fast = compiled(lambda t: _unpacked(t, x.dtype) if back else _packed(t))
    calls: dict[str, Call] = {
        "torch": eager,
        "torch_compile": lambda: fast(plain if back else x),
        **ours(group.device, lambda: quant.unpack_bits(bits, x.dtype) if back else quant.pack_bits(x)),
    }
    return Case(calls, (x, plain, bits.planes), x.nbytes + bits.planes.nbytes, 0, logits_bytes=x.nbytes)


CASES.update({"binarize": binarize, "pack_bits": pack_bits})
