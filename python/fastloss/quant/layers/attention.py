"""Binary attention as a module: binary projections around `binary_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..binary_attention import BETA, binary_attention
from .binary_linear import BinaryLinear


class BinaryAttention(nn.Module):
    """Multi-head attention of bits: q, k and v by `BinaryLinear`, attention weights 0 and 1, an output projection.

    out = proj(heads(binary_attention(q, k, v))). Train it as it is; `pack_model` (or `.pack()` of its projections) makes
    it one for inference, where scores, threshold and sums are products of bits.

    Args:
        embed_dim, num_heads, bias, device, dtype: as of torch.nn.MultiheadAttention, batch first; one input, which is
            query, key and value.
        beta: see `softmax_aware_binarize`.
        binary_values: False keeps the values as they are.
        options: keywords of `BinaryOptions` for the four projections; BiViT's: center=True, scale="learned".

    "BiViT: Extremely Compressed Binary Vision Transformer".
    """

    def __init__(
        self, embed_dim: int, num_heads: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        beta: float = BETA, binary_values: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta}")
        super().__init__()
        self.embed_dim, self.num_heads, self.beta, self.binary_values = embed_dim, num_heads, beta, binary_values
        factory = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            BinaryLinear(embed_dim, embed_dim, bias, **factory, **options) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., L, embed_dim]; mask as of `binary_attention`, for [..., heads, L, L]."""
        if x.dim() < 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be [..., L, {self.embed_dim}], got {list(x.shape)}")
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = binary_attention(q, k, v, mask, beta=self.beta, binary_values=self.binary_values)
        return self.out_proj(out.transpose(-2, -3).flatten(-2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, beta={self.beta}, binary_values={self.binary_values}"
