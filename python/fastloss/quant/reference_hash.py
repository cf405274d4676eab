"""The `reference` backend of `hash_attention`: plain PyTorch, any device, itself differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import kernel
from .contract import HashGrad
from .ops import wide

#: Tokens whose pairs are looked at one by one in the causal form; what lies before them is summed already.
CHUNK = 64


def attend(x: Tensor, w: Tensor, z: Tensor, direction: int = 0) -> Tensor:
    """y_i = sum over j of <x_i, w_j> z_j without the matrix of pairs: x [G, N, A], w [G, M, A], z [G, M, C] -> [G, N, C].

    direction: 0: all j; 1: j <= i; -1: j >= i (N = M).
    """
    with torch.autocast(x.device.type, enabled=False):  # which is on while an op runs, and would round to 16 bits
        if direction < 0:
            return _attend(x.flip(1), w.flip(1), z.flip(1), True).flip(1)
        return _attend(x, w, z, bool(direction))


def _attend(x: Tensor, w: Tensor, z: Tensor, causal: bool) -> Tensor:
    if not causal:
        return x @ (w.mT @ z)
    tokens, missing = x.shape[1], -x.shape[1] % CHUNK
    x, w, z = (torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK)) for t in (x, w, z))
    through = (w.mT @ z).cumsum(1)
    before = torch.cat((torch.zeros_like(through[:, :1]), through[:, :-1]), 1)
    y = x @ before + (x @ w.mT).tril() @ z
    return y.flatten(1, 2)[:, :tokens]


def _with(x: Tensor, number: Tensor | float) -> Tensor:
    """x with one more column."""
    column = number if isinstance(number, Tensor) else x.new_full((*x.shape[:-1], 1), number)
    return torch.cat((x, column), -1)


def denominators(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """D [G, N]: <q_i, sum of k_j> + b times how many j there are."""
    sums = k.cumsum(1) if causal else k.sum(1, keepdim=True)
    seen = torch.arange(1, k.shape[1] + 1, device=k.device, dtype=k.dtype) if causal else k.shape[1]
    return (q * sums).sum(-1) + (q.shape[-1] + 1) * seen


@kernel("hash_attention", "reference")
def hash_attention(q: Tensor, k: Tensor, v: Tensor, own: bool, causal: bool) -> tuple[Tensor, Tensor]:
    dtype, b = v.dtype, q.shape[-1] + 1
    q, k, v = (t.to(wide(t)) for t in (q, k, v))
    d = denominators(q, k, causal)
    above = attend(q, k, v, causal) + b * v if own else attend(_with(q, b), _with(k, 1), v, causal)
    return (above / d[..., None]).to(dtype), d


@kernel("hash_attention_backward", "reference")
def hash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d: Tensor, own: bool, causal: bool, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, b, none = v.dtype, q.shape[-1] + 1, v.new_empty(0)
    grad, q, k, v, out = (t.to(wide(t)) for t in (grad, q, k, v, out))
    g = grad / d[..., None]
    s = -(g * out).sum(-1, keepdim=True)
    dq = attend(_with(g, s), _with(v, 1), k, causal) if needs & HashGrad.Q else none
    dk = attend(_with(v, 1), _with(g, s), q, -causal) if needs & HashGrad.K else none
    dv = none
    if needs & HashGrad.V:
        dv = attend(k, q, g, -causal) + b * g if own else attend(_with(k, 1), _with(q, b), g, -causal)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
