"""Learned steps and saved activations: the cases of test_quant_fake.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Group
from fastloss import quant
from implementations import CASES, Call, Case, compiled, ours


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def lsq(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """4 signed bits, as repositories write it."""
    scale = (scale - scale * factor).detach() + scale * factor
    return _RoundStraightThrough.apply((x / scale).clamp(-8, 7)) * scale


def step(forward: Call, grad: Tensor, *leaves: Tensor) -> Call:
    """Forward and backward from a given gradient into fresh ones."""

    def call() -> object:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(grad)  # type: ignore[attr-defined]
        return y

    return call


def fake_quant(group: Group) -> Case:
    """LSQ of 4 bits with one step: values, dx and dscale."""
    x, _ = common.logits(group)
    grad, factor = torch.randn_like(x), 1 / math.sqrt(x.numel() * 7)
    scale, own = torch.tensor(0.3, dtype=x.dtype, device=x.device), torch.tensor([0.3], device=x.device)
    zero = torch.zeros(1, device=x.device)
    for leaf in (x, scale, own):
        leaf.requires_grad_()
    fast = compiled(lsq)
    calls = {
        "torch": step(lambda: lsq(x, scale, factor), grad, x, scale),
        "torch_compile": step(lambda: fast(x, scale, factor), grad, x, scale),
        **ours(group.device, step(lambda: quant.fake_quant(x, own, bits=4), grad, x, own)),
    }
    if x.dtype == torch.float32:
        core = torch._fake_quantize_learnable_per_tensor_affine
        calls["torch_core"] = step(lambda: core(x, own, zero, -8, 7, factor), grad, x, own)
    return Case(calls, (x, own, scale, zero), 5 * x.nbytes, 0, gradient_bytes=x.nbytes, logits_bytes=x.nbytes)


def saved_gelu(group: Group) -> Case:
    """GELU that saves 8 bits a number: forward and backward."""
    x, _ = common.logits(group)
    x.requires_grad_()
    grad = torch.randn_like(x)
    codec = quant.ActivationCodec()
    fast = compiled(F.gelu)
    calls = {
        "torch": step(lambda: F.gelu(x), grad, x),
        "torch_compile": step(lambda: fast(x), grad, x),
        **ours(group.device, step(lambda: quant.gelu(x, codec=codec), grad, x)),
    }
    return Case(calls, (), 4 * x.nbytes + x.numel() * 2, 0, gradient_bytes=x.nbytes, logits_bytes=x.nbytes)


def codec(group: Group) -> Case:
    """x to codes of 8 bits in groups of 256 and back, mode nearest or stochastic."""
    x, _ = common.logits(group)
    flat, stochastic = x.reshape(-1), group.mode == "stochastic"

    def eager(flat: Tensor) -> Tensor:
        rows = flat.float().reshape(-1, 256 if flat.numel() % 256 == 0 else flat.shape[0])
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        step = (high - low) / 255
        v = (rows - low) / step
        codes = ((v + torch.rand_like(v)).floor() if stochastic else v.round()).clamp(0, 255).to(torch.uint8)
        return (codes.float() * step + low).to(flat.dtype)

    fast, mine = compiled(eager), quant.ActivationCodec(stochastic=stochastic)
    calls: dict[str, Call] = {
        "torch": lambda: eager(flat),
        "torch_compile": lambda: fast(flat),
        **ours(group.device, lambda: mine.decode(mine.encode(flat))),
    }
    return Case(calls, (flat,), 2 * x.nbytes + 2 * x.numel(), 0, logits_bytes=x.nbytes)


CASES.update({"fake_quant": fake_quant, "saved_gelu": saved_gelu, "activation_codec": codec})
