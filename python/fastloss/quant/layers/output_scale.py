"""Learned scales of an output by channel, row and column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OutputScale(nn.Module):
    """y = x alpha_c beta_h gamma_w: one learned vector for each dimension of [N, C, H, W], first 1.

    After a `BinaryConv2d` with scale=None it stands for all scales of weights and inputs.

    Args:
        channels: C. height, width: H and W; None leaves the vector out, and takes images of any size.

    The operator of "XNOR-Net++: Improved Binary Neural Networks", in "BiBench: Benchmarking and Analyzing Network
    Binarization".
    """

    alpha: Tensor
    beta: Tensor | None
    gamma: Tensor | None

    def __init__(
        self, channels: int, height: int | None = None, width: int | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.sizes = (channels, height, width)
        for name, size in zip(("alpha", "beta", "gamma"), self.sizes, strict=True):
            made = None if size is None else nn.Parameter(torch.ones(size, device=device, dtype=dtype))
            self.register_parameter(name, made)

    def forward(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[-3:])
        if len(shape) != 3 or any(size not in (None, given) for size, given in zip(self.sizes, shape, strict=True)):
            raise ValueError(f"x must be [..., C, H, W] = {self.sizes}, got {list(x.shape)}")
        scale = self.alpha[:, None, None]
        if self.beta is not None:
            scale = scale * self.beta[:, None]
        if self.gamma is not None:
            scale = scale * self.gamma
        return x * scale.to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.sizes))
