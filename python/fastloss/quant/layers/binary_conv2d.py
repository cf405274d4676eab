"""BinaryConv2d: a convolution of one-bit weights and one-bit inputs, by im2col of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...pairs.arguments import autocast_dtype
from ..binarize import _statistics, binarize
from ..binary_conv2d import binary_conv2d, geometry_of, pair
from ..bit_tensor import BitTensor
from ..patches import pack_kernel, pack_pixels
from ..sign_conv2d import packed_conv2d, padded
from ..surrogates import SurrogateFunction
from .binary import BinaryLayer, decided, finished
from .binary_linear import PackedBits, copied, detached


class BinaryConv2d(BinaryLayer):
    """y = scale_o conv2d(sign(x - input_shift), sign(W - c)) + bias_o: torch.nn.Conv2d with one bit a weight and input.

    Trained on latent weights by `binary_conv2d`; `pack()` for inference. Fastest, and packed best, with channels (of a
    group) a multiple of 64. The result lies channels last in memory.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            of torch.nn.Conv2d. padding_mode also "ones": see `binary_conv2d`.
        options: keywords of `BinaryOptions`.

    Attributes and sources: as of `BinaryLinear`; weight [out_channels, in_channels / groups, kh, kw].
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Any = None, dtype: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(groups, int) or groups < 1 or in_channels % groups:
            raise ValueError(f"groups must divide the {in_channels} channels, got {groups}")
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            pair("kernel_size", kernel_size, 1),
        )
        self.stride, self.padding, self.dilation = pair("stride", stride, 1), padding, pair("dilation", dilation, 1)
        self.groups, self.padding_mode = groups, padding_mode
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        # Says at once what does not fit; the image is as large as any padding mode needs.
        geometry_of(torch.Size((1, in_channels, 1 << 16, 1 << 16)), shape, *self._place())
        self._options(shape, in_channels, bias, {"device": device, "dtype": dtype}, **options)

    def _place(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.padding_mode

    @classmethod
    def from_float(cls, layer: nn.Conv2d, **options: Any) -> BinaryConv2d:
        """One that starts from the weight and bias of a torch.nn.Conv2d."""
        made = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
            layer.groups, layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype,
            **{"padding_mode": layer.padding_mode, **options},
        )  # fmt: skip
        return copied(made, layer)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.input_scale else self.bias
        if self.real_weight:
            geometry = geometry_of(x.unsqueeze(0).shape[-4:], tuple(self.weight.shape), *self._place())
            signs = binarize(x, self.input_surrogate, shift=self.input_shift, dim=-3)
            y = nn.functional.conv2d(
                padded(signs, geometry), self._sine_weight(), bias, self.stride, 0, self.dilation, self.groups  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            words = self._words()
            y = binary_conv2d(
                x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups,
                padding_mode=self.padding_mode, **words,
            )  # fmt: skip
        return finished(y, x, (-3, -2, -1), self.bias) if self.input_scale else y

    def pack(self) -> PackedBinaryConv2d:
        """The layer for inference, which holds bits instead of weights."""
        scale = self.packed_weight().scale
        with torch.no_grad():
            # Not times the scale: a learned one may be negative.
            _, shift, _ = _statistics(self.weight, self._scale(), self.center, None, 0, True)
            signs = binarize(self.weight, self.weight_surrogate, shift=shift)
            planes, popcounts = pack_kernel(signs)  # type: ignore[arg-type]
        columns = self.weight.shape[2] * self.weight.shape[3] * 8 * -(-self.weight.shape[1] // 8)
        bits = BitTensor(planes, popcounts, scale, columns, (2,), -1)
        return PackedBinaryConv2d(
            bits,
            self.bias,
            self.input_shift,
            self.input_surrogate,
            self.input_scale,
            tuple(self.weight.shape),
            self._place(),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, {self._option_words()}"
        )


class PackedBinaryConv2d(PackedBits):
    """`BinaryConv2d` for inference: bits of the weights, no gradient. Made by `BinaryConv2d.pack`.

    `planes` hold a kernel in the order rows, columns, channels; the channels of a group fill whole bytes.
    """

    input_shift: Tensor | None

    def __init__(
        self, bits: BitTensor, bias: Tensor | None, input_shift: Tensor | None, input_surrogate: SurrogateFunction,
        input_scale: bool, weight_shape: tuple[int, ...], place: tuple[Any, ...],
    ) -> None:  # fmt: skip
        super().__init__(bits, bias)
        self.input_surrogate, self.input_scale = input_surrogate, input_scale
        self.weight_shape, self.place = weight_shape, place
        self.register_buffer("input_shift", detached(input_shift))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self(x[None])[0]
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {x.dtype}")
        geometry = geometry_of(x.shape, self.weight_shape, *self.place)
        pixels = pack_pixels(decided(x.detach().permute(0, 2, 3, 1), self.input_shift, self.input_surrogate), geometry)
        scale = None if self.scale is None else self.scale.reshape(-1)
        bias = None if self.input_scale else self.bias
        y = packed_conv2d(pixels, self.planes, self.popcounts, scale, bias, geometry, autocast_dtype(x))
        return finished(y, x, (-3, -2, -1), self.bias) if self.input_scale else y

    def extra_repr(self) -> str:
        stride, padding, dilation, groups, mode = self.place
        return (
            f"{self.weight_shape[1] * groups}, {self.weight_shape[0]}, kernel_size={self.weight_shape[2:]}, "
            f"stride={stride}, padding={padding!r}, dilation={dilation}, groups={groups}, bias={self.bias is not None}, "
            f"padding_mode={mode!r}"
        )
