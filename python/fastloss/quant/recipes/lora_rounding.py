"""Rounding learned by two thin matrices, and the reconstruction of several blocks at once (CBQ)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fake_quant import lsq_levels


class LoraRounding(nn.Module):
    """Whether each weight is rounded up or down, as a matrix of low rank.

        dW = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1),   V = A_1 A_2,   A_1 [R, rank], A_2 [rank, K]
        W' = scale clamp(floor(W / scale) + dW, Qn, Qp)

    `regularizer` drives dW to 0 or 1 (the paper lowers its beta over the training by a schedule that was not found: give
    it), and `rounded` is W' with dW taken as 0 or 1. A_1 starts at 0, so that dW starts at 1/2; A_2 normal, 1 / sqrt(rank).
    The paper's rank was not found.

    Args:
        weight: [R, K] floating, kept as a constant. scale: [1] or [R] > 0. bits: 2 to 8, signed.
        rank: of V. zeta, gamma: 1.1 and -0.1 as in AdaRound.

    Raises ValueError and TypeError. Source: "CBQ: Cross-Block Quantization for Large Language Models".
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, bits: int, rank: int, *, zeta: float = 1.1, gamma: float = -0.1
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be floating [R, K], got {weight.dtype} {list(weight.shape)}")
        if scale.numel() not in (1, weight.shape[0]) or not bool((scale > 0).all()):
            raise ValueError(f"scale must be 1 or {weight.shape[0]} numbers > 0, got {list(scale.shape)}")
        if bits != int(bits) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits}")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
        if not (zeta > 1 and gamma < 0):
            raise ValueError(f"zeta must be > 1 and gamma < 0, got {zeta} and {gamma}")
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("scale", scale.detach().reshape(-1, 1).to(weight.dtype))
        self.levels, self.zeta, self.gamma = lsq_levels(int(bits)), zeta, gamma
        rows, columns = weight.shape
        self.first = nn.Parameter(weight.new_zeros(rows, rank))
        self.second = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype, device=weight.device) / rank**0.5)

    def up(self) -> Tensor:
        """dW [R, K] in [0, 1]."""
        v = self.first @ self.second
        return (torch.sigmoid(v) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def _levels(self, up: Tensor) -> Tensor:
        return ((self.weight / self.scale).floor() + up).clamp(self.levels.low, self.levels.high) * self.scale

    def forward(self) -> Tensor:
        """W' [R, K], differentiable in V."""
        return self._levels(self.up())

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """W' with dW at 1 where it is 1/2 or more, else at 0: what is stored."""
        return self._levels((self.up() >= 0.5).to(self.weight.dtype))

    def regularizer(self, beta: float) -> Tensor:
        """L_com = sum 1 - |2 dW - 1|^beta: 0 where every dW is 0 or 1."""
        if not beta > 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


def reconstruction_loss(full: Tensor, quantized: Tensor) -> Tensor:
    """|h_1 - h_2|^2 + KL(softmax h_1 || softmax h_2) of the outputs of a window of blocks, the mean over rows.

    Args:
        full, quantized: [..., D], of the same input by full and by quantised blocks. No gradient in `full`.

    Raises ValueError. Source: "CBQ: Cross-Block Quantization for Large Language Models".
    """
    if full.shape != quantized.shape or not full.dim() or not full.numel():
        raise ValueError(
            f"full and quantized must be [..., D] alike, got {list(full.shape)} and {list(quantized.shape)}"
        )
    a, b = full.detach().reshape(-1, full.shape[-1]), quantized.reshape(-1, full.shape[-1])
    divergence = F.kl_div(F.log_softmax(b, 1), F.log_softmax(a, 1), reduction="batchmean", log_target=True)
    return (a - b).square().sum(1).mean() + divergence


def block_windows(blocks: int, window: int = 2, overlap: int = 1) -> Iterator[range]:
    """The windows of blocks that are reconstructed together, in order: range(0, window), each next one `overlap` blocks
    back; the last one ends at `blocks`.

    ValueError unless 0 <= overlap < window and blocks >= 1. Source: "CBQ: Cross-Block Quantization for Large Language
    Models" (2 and 1).
    """
    if blocks < 1 or not 0 <= overlap < window:
        raise ValueError(f"blocks >= 1 and 0 <= overlap < window are wanted, got {blocks}, {overlap} and {window}")
    start = 0
    while True:
        stop = min(start + window, blocks)
        yield range(start, stop)
        if stop == blocks:
            return
        start += window - overlap
