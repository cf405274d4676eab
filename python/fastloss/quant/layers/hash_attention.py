"""Attention of hashed queries and keys as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hash_attention import BIASES, hash_attention
from ..kernel_hash import kernel_hash
from ..learn_hash import learn_hash


class HashAttention(nn.Module):
    """out = hash_attention(code(q), code(k), v), code = kernel_hash with anchors, projection and mean as buffers.

    Queries and keys are hashed alike; in the paper they are one tensor. Call `learn` on tokens of training data before
    use, and again whenever the features have moved: until then the projection is random.

    Args:
        num_heads, head_dim: H and D.
        bits: of a code; supports: m, the number of anchors.
        bias, causal: as of `hash_attention`.

    "EcoFormer: Energy-Saving Attention with Linear Complexity". Raises ValueError.
    """

    anchors: Tensor
    projection: Tensor
    mean: Tensor

    def __init__(
        self, num_heads: int, head_dim: int, *, bits: int = 16, supports: int = 25, bias: str = "sum", causal: bool = False
    ) -> None:  # fmt: skip
        if min(num_heads, head_dim, bits, supports) < 1:
            raise ValueError(f"sizes must be at least 1, got {num_heads}, {head_dim}, {bits} and {supports}")
        if bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
        super().__init__()
        self.bias, self.causal = bias, causal
        anchors = nn.functional.normalize(torch.randn(num_heads, supports, head_dim), dim=-1)
        self.register_buffer("anchors", anchors)
        self.register_buffer("projection", torch.randn(num_heads, bits, supports))
        self.register_buffer("mean", torch.zeros(num_heads, supports))

    @torch.no_grad()
    def learn(self, x: Tensor, *, generator: torch.Generator | None = None, **options: Any) -> None:
        """Anchors are tokens of x [B, H, N, D] chosen at random, the same in every head; projection and mean are those of
        `learn_hash`, which takes `options` (topk, steps, learning_rate, momentum)."""
        heads, supports, width = self.anchors.shape
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != width or x.shape[0] * x.shape[2] < supports:
            raise ValueError(f"x must be [B, {heads}, N, {width}] with at least {supports} tokens, got {list(x.shape)}")
        tokens = x.to(self.anchors).transpose(1, 2).flatten(0, 1)
        at = torch.randperm(len(tokens), generator=generator, device=generator.device if generator else "cpu")[
            :supports
        ]
        self.anchors.copy_(nn.functional.normalize(tokens[at.to(x.device)].transpose(0, 1), dim=-1))
        bits = self.projection.shape[1]
        projection, mean = learn_hash(x, self.anchors, bits=bits, generator=generator, **options)
        self.projection.copy_(projection)
        self.mean.copy_(mean)

    def codes(self, x: Tensor) -> Tensor:
        """[B, H, N, bits] of x [B, H, N, D]."""
        made = kernel_hash(x, self.anchors, self.projection, self.mean)
        assert isinstance(made, Tensor)
        return made

    def forward(self, q: Tensor, v: Tensor, k: Tensor | None = None) -> Tensor:
        """q [B, H, N, D], v [B, H, M, E], k [B, H, M, D] or None for q -> [B, H, N, E]."""
        q_codes = self.codes(q)
        return hash_attention(q_codes, q_codes if k is None else self.codes(k), v, bias=self.bias, causal=self.causal)

    def extra_repr(self) -> str:
        heads, bits, supports = self.projection.shape
        width = self.anchors.shape[-1]
        return f"{heads}, {width}, bits={bits}, supports={supports}, bias={self.bias!r}, causal={self.causal}"
