"""How a contrastive loss is compared with its dense formula: value and every gradient in float64, and float32 or bfloat16 by
the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tolerance import check_close, check_gradient

NEG = float("-inf")


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random leaf tensors."""
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """The dense matrix of cosines."""
    return (q / q.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).t()


def agree(ours: Tensor, dense: Tensor, inputs: Sequence[Tensor], rtol: float = 1e-9) -> None:
    """Value and the gradients in all inputs."""
    assert ours.shape == dense.shape, f"{ours.shape} against {dense.shape}"
    torch.testing.assert_close(ours, dense, rtol=rtol, atol=1e-11)
    weight = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).view(ours.shape)
    mine = torch.autograd.grad((ours * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    right = torch.autograd.grad((dense * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    for a, b in zip(mine, right, strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b.expand_as(a).to(a.dtype), rtol=rtol, atol=1e-9 * scale + 1e-12)


def agree_in(
    dtype: torch.dtype,
    ours: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    k: float = 8.0,
) -> None:
    """The same in float32 or bfloat16 against float64 by the tolerance rule, torch's own dense formula beside it."""
    low = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in low]
    values = ours(*low), dense(*low), dense(*wide)
    fp32 = torch.float32 if dtype != torch.float64 else dtype
    check_close(
        values[0].reshape(-1), values[1].reshape(-1), values[2].reshape(-1), fp32 if dtype == fp32 else dtype, k
    )
    grads = [torch.autograd.grad(v.sum(), x) for v, x in zip(values, (low, low, wide), strict=True)]
    for mine, torch_own, right in zip(*grads, strict=True):
        check_gradient(mine, torch_own, right, dtype, k)
