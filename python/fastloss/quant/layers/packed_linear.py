"""The layer that ternary and low-bit linear layers become for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...pairs.arguments import autocast_dtype
from ..bit_tensor import BitTensor
from ..bits import pack_codes
from ..lowbit_linear import check_linear, lowbit_linear
from .binary_linear import PackedBits, detached


class PackedLinear(nn.Module):
    """y = x (W_1 + W_2 + ..)ᵀ + bias, each W a BitTensor, on inputs that `inputs` has quantised; no gradient.

    One part is what up to 4 bits take; two parts are 5 to 8 bits (high and low four), or two bases.

    Args:
        parts: the weights, [out_features, in_features] each.
        bias: [out_features] or None.
        inputs: what is done to x first, such as a `LearnedStep`; None: nothing.
        act_quant: as of `lowbit_linear`.
        offset: [out_features] or [1], added to every weight of a row, or None.
    """

    bias: Tensor | None
    offset: Tensor | None

    def __init__(
        self, parts: Sequence[BitTensor], bias: Tensor | None, inputs: nn.Module | None = None,
        act_quant: str | None = None, offset: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not parts or len({bits.shape for bits in parts}) != 1:
            raise ValueError(f"parts must be weights of one shape, got {[list(bits.shape) for bits in parts]}")
        self.out_features, self.in_features = parts[0].shape
        self.act_quant = act_quant
        self.parts = nn.ModuleList(PackedBits(bits, None) for bits in parts)
        self.inputs = inputs
        self.register_buffer("bias", detached(bias))
        self.register_buffer("offset", detached(offset))

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(t.nbytes for t in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        check_linear(x, self.in_features, self.out_features, None)
        dtype = autocast_dtype(x)
        x = x.detach() if self.inputs is None else self.inputs(x.detach())
        weights = [part.bits for part in self.parts if isinstance(part, PackedBits)]
        y = lowbit_linear(x, weights[0], self.bias, act_quant=self.act_quant)
        for bits in weights[1:]:
            y = y + lowbit_linear(x, bits, act_quant=self.act_quant)
        if self.offset is not None:
            y = y + x.sum(-1, keepdim=True) * self.offset.to(x.dtype)
        return y.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def frozen(module: nn.Module) -> Any:
    """The same module with buffers in place of its parameters, for inference."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach().clone())
    return module.eval()


def code_parts(codes: Tensor, step: Tensor, bits: int, odd: bool = False) -> list[BitTensor]:
    """Bits whose sum is codes * step, or (codes + 1/2) step (odd): one BitTensor, or for 5 to 8 bits the high bits and the
    low four.

    Args:
        codes: [R, K] floating integers of -2^(bits-1) .. 2^(bits-1) - 1; step [R or 1, 1].
    """
    if bits <= 4:
        return [pack_codes(codes * step + step / 2 if odd else codes * step, step, bits, odd=odd)]
    low = codes.remainder(16)
    parts = [pack_codes((codes - low) / 16, 1.0, bits - 4), pack_codes(low, 1.0, 4, signed=False)]
    steps = [step.expand(codes.shape[0], 1).contiguous().float() for _ in parts]
    parts[0] = parts[0]._replace(scale=16 * steps[0])
    if odd:  # twice a code and one, in half steps
        return [parts[0], parts[1]._replace(weights=(2, 4, 8, 16), offset=1, scale=steps[1] / 2)]
    return [parts[0], parts[1]._replace(scale=steps[1])]
