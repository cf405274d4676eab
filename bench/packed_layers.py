"""Layers on packed weights: the cases of test_quant_linear.py. Shapes are M, K, N."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Group
from fastloss import quant
from implementations import CASES, Call, Case, compiled, ours


def operands(group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], w [N, K], bias [N] and an upstream gradient [M, N]."""
    m, k, n = group.shape
    torch.manual_seed(0)
    shapes = ((m, k), (n, k), (n,), (m, n))
    x, w, bias, grad = (torch.randn(*s, device=group.device).to(group.torch_dtype) for s in shapes)
    return x, w, bias, grad


def packed(w: Tensor, bits: str) -> quant.BitTensor:
    """Weights of "1", "1.58", "2" or "4" bits, the last in groups of 128 columns with "4g"."""
    w = w.detach().float()
    if bits == "1":
        return quant.pack_bits(w, scale=w.abs().mean(1))
    if bits == "1.58":
        return quant.pack_ternary(w, 0.5, scale=0.8)
    group = 128 if bits.endswith("g") else 0
    count = int(bits.rstrip("g"))
    rows = w.reshape(len(w), -1, group) if group else w[:, None]
    return quant.pack_codes(w, rows.abs().amax(2) / 2 ** (count - 1), count, group=group)


def lowbit_linear(group: Group) -> Case:
    """Inference from packed weights; `mode` is their bits, and "int8" behind it that of int8 rows."""
    x, w, bias, _ = operands(group)
    bits, *int8 = group.mode.split()
    weight, act_quant = packed(w, bits), "int8row" if int8 else None
    calls: dict[str, Call] = {"torch": lambda: F.linear(x, w, bias)}
    if group.torch_dtype == torch.float32:
        half = tuple(t.bfloat16() for t in (x, w, bias))
        calls["torch_bfloat16"] = lambda: F.linear(*half)
    calls |= ours(group.device, lambda: quant.lowbit_linear(x, weight, bias, act_quant=act_quant))
    m, k, n = group.shape
    return Case(without_gradient(calls), (x, w), weight.planes.nbytes, 2 * m * k * n)


def binary_inference(group: Group) -> Case:
    """One-bit weights packed once, one-bit inputs packed in the call."""
    x, w, bias, _ = operands(group)
    weight, real_bias = packed(w, "1"), bias.float()
    calls: dict[str, Call] = {
        "torch": lambda: F.linear(x, w, bias),
        **ours(group.device, lambda: quant.bgemm(quant.pack_bits(x), weight, real_bias, dtype=x.dtype)),
    }
    m, k, n = group.shape
    return Case(without_gradient(calls), (x, w), weight.planes.nbytes, 2 * m * k * n)


def without_gradient(calls: dict[str, Call]) -> dict[str, Call]:
    def wrap(call: Call) -> Call:
        return lambda: torch.no_grad()(call)()

    return {name: wrap(call) for name, call in calls.items()}


def sign(u: Tensor) -> Tensor:
    """The clipped straight-through estimator as repositories write it."""
    clipped = u.clamp(-1, 1)
    return clipped + (torch.where(u >= 0, 1.0, -1.0).to(u.dtype) - clipped).detach()


def eager_binary(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.linear(sign(x), sign(w)) * w.detach().abs().mean(1) + bias


def eager_ternary(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """BitNet b1.58 with int8 rows."""
    scale = w.detach().abs().mean().clamp(min=1e-5)
    t = w + ((w.detach() / scale).round().clamp(-1, 1) * scale - w).detach()
    size = x.detach().abs().amax(1, keepdim=True) / 127
    return F.linear(x + ((x.detach() / size).round() * size - x).detach(), t, bias)


def training(group: Group) -> Case:
    """Forward and backward of a layer with latent weights; `mode` names it."""
    leaves = operands(group)
    grad = leaves[-1]
    x, w, bias = (t.requires_grad_() for t in leaves[:3])
    if group.mode == "binary":
        eager, layer = eager_binary, quant.binary_linear
    else:
        eager = eager_ternary
        layer = lambda *args: quant.ternary_linear(*args, act_quant="int8row")  # noqa: E731

    def step(function: object) -> Call:
        def call() -> None:
            x.grad = w.grad = bias.grad = None
            function(x, w, bias).backward(grad)  # type: ignore[operator]

        return call

    calls = {
        "torch": step(eager), "torch_compile": step(compiled(eager)), "torch_linear": step(F.linear),
        **ours(group.device, step(layer)),
    }  # fmt: skip
    m, k, n = group.shape
    return Case(calls, (x, w), x.nbytes + w.nbytes, 6 * m * k * n, gradient_bytes=x.nbytes + w.nbytes)


CASES |= {"lowbit_linear": lowbit_linear, "binary_inference": binary_inference, "quantised_training": training}
