"""What the tests of contrastive losses share: losses against dense formulas, by autograd, in float64 and below."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tolerance import check_close, check_gradient

Loss = Callable[..., Tensor]


def embeddings(*shape: int, seed: int = 0, count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """`count` trained tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]


def check_same(ours: Loss, dense: Loss, inputs: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Value and all gradients of two functions of the same float64 inputs agree; the values are vectors or numbers."""
    mine, right = ours(*inputs), dense(*inputs)
    torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
    seed = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=right.dtype)
    gradients = [
        torch.autograd.grad(value, inputs, seed, allow_unused=True, materialize_grads=True) for value in (mine, right)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_narrow(ours: Loss, dense: Loss, inputs: Sequence[Tensor], dtype: torch.dtype, k: float = 4.0) -> None:
    """The rule of tolerance.py: in `dtype` the loss is as near the float64 dense formula as the dense formula in `dtype`."""
    narrow = [x.detach().to(dtype) for x in inputs]
    sets = [[x.clone().requires_grad_() for x in narrow] for _ in range(2)] + [
        [x.double().requires_grad_() for x in narrow]
    ]
    values = [f(*x) for f, x in zip((ours, dense, dense), sets, strict=True)]
    check_close(values[0], values[1], values[2], torch.float32 if values[0].dtype == torch.float32 else dtype, k)
    gradients = [torch.autograd.grad(v, x) for v, x in zip(values, sets, strict=True)]
    for mine, torchs, right in zip(*gradients, strict=True):
        check_gradient(mine, torchs, right, dtype, k)
