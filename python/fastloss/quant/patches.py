"""Images as bits: channels packed pixel by pixel, so that the patches under a kernel (im2col) are a copy of bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import Pack, row_bytes

_ops = torch.ops.fastloss
PADDING_MODES = ("zeros", "ones", "reflect", "replicate", "circular")


class Geometry(NamedTuple):
    """Where a convolution looks: of an image [N, H, W, groups * channels] under a kernel [O, channels, kernel]."""

    height: int
    width: int
    channels: int  # of one group
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom, as torch.nn.functional.pad
    mode: str

    @property
    def channel_bytes(self) -> int:
        return -(-self.channels // 8)

    @property
    def columns(self) -> int:
        """Bits of a patch. A group's channels fill whole bytes: the bits behind them are 0 in pixels and in weights."""
        return self.kernel[0] * self.kernel[1] * 8 * self.channel_bytes

    @property
    def filler(self) -> int:
        """What the bits behind the channels add to a product: (-1) (-1) each."""
        return self.columns - self.kernel[0] * self.kernel[1] * self.channels

    @property
    def padded(self) -> tuple[int, int]:
        left, right, top, bottom = self.padding
        return self.height + top + bottom, self.width + left + right

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip(self.padded, self.kernel, self.stride, self.dilation, strict=True)
        height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)
        return height, width


def _whole_bytes(x: Tensor) -> Tensor:
    """The last dimension filled up to a multiple of 8 with -1, whose bit is 0."""
    return pad(x, (0, -x.shape[-1] % 8), value=-1.0) if x.shape[-1] % 8 else x


def pack_pixels(x: Tensor, geometry: Geometry) -> Tensor:
    """Signs of x [N, H, W, groups * channels] as planes [1, N, B]: one row an image, pixel after pixel."""
    flat = _whole_bytes(x.unflatten(-1, (geometry.groups, geometry.channels))).flatten(1)
    return _ops.pack_bits.default(flat, int(Pack.SIGN), None, None, 0, 0, 1)[0]


def unpack_pixels(planes: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The signs [N, groups * channels, H, W] again, channels last in memory."""
    g = geometry
    columns = g.height * g.width * g.groups * 8 * g.channel_bytes
    flat = _ops.unpack_bits.default(planes, columns, [2], -1, None, 0, dtype)
    x = flat.unflatten(1, (g.height, g.width, g.groups, 8 * g.channel_bytes))[..., : g.channels]
    return x.flatten(3).permute(0, 3, 1, 2)


def pack_kernel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of a weight [O, channels, kh, kw] as (planes [1, O, B], popcounts [1, O]), in the order of a patch."""
    flat = _whole_bytes(weight.permute(0, 2, 3, 1)).flatten(1)
    return _ops.pack_bits.default(flat, int(Pack.SIGN), None, None, 0, 0, 1)


def unpack_kernel(planes: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The signs [O, channels, kh, kw] again."""
    flat = _ops.unpack_bits.default(planes, geometry.columns, [2], -1, None, 0, dtype)
    return flat.unflatten(1, (*geometry.kernel, -1))[..., : geometry.channels].permute(0, 3, 1, 2)


def source(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Which index each index of a padded dimension repeats (reflect, replicate, circular)."""
    index = torch.arange(size, device=device, dtype=torch.float32)[None, None]
    return pad(index, (before, after), mode=mode)[0, 0].long()


def _pad_bits(pixels: Tensor, geometry: Geometry) -> Tensor:
    """[N, H, W, groups, bytes] -> [N, padded H, padded W, groups, bytes]; "zeros" gives bits 0 (`correction` puts it right)."""
    left, right, top, bottom = geometry.padding
    if not any(geometry.padding):
        return pixels
    if geometry.mode == "zeros":
        return pad(pixels, (0, 0, 0, 0, left, right, top, bottom))
    if geometry.mode == "ones":
        ones = [min(8, geometry.channels - 8 * i) for i in range(geometry.channel_bytes)]
        framed = torch.tensor([(1 << count) - 1 for count in ones], dtype=torch.uint8, device=pixels.device)
        framed = framed.expand(pixels.shape[0], *geometry.padded, geometry.groups, -1).contiguous()
        framed[:, top : top + geometry.height, left : left + geometry.width] = pixels
        return framed
    rows = source(geometry.height, top, bottom, geometry.mode, pixels.device)
    columns = source(geometry.width, left, right, geometry.mode, pixels.device)
    return pixels[:, rows][:, :, columns]


def _windows(x: Tensor, geometry: Geometry) -> Tensor:
    """A view of [N, padded H, padded W, ...] as [N, H', W', kh, kw, ...]."""
    for dim in (0, 1):
        kernel, stride, dilation = geometry.kernel[dim], geometry.stride[dim], geometry.dilation[dim]
        x = x.unfold(1 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = (0, 1, 2, x.dim() - 2, x.dim() - 1, *range(3, x.dim() - 2))
    return x.permute(order)


def _ones(bits: Tensor) -> Tensor:
    """The number of ones in each byte of a contiguous [..., bytes], eight bytes at a time where that is possible."""
    by_word = bits.shape[-1] % 8 == 0
    spread = 0x0101010101010101 if by_word else 1
    words = bits.view(torch.int64) if by_word else bits
    pairs = words - (words >> 1 & 0x55 * spread)
    nibbles = (pairs & 0x33 * spread) + (pairs >> 2 & 0x33 * spread)
    return (nibbles + (nibbles >> 4) & 0x0F * spread).view(torch.uint8)


def patches(planes: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The patches of packed pixels, as operands of `bgemm`: (planes [groups, N H' W', B], popcounts [groups, N H' W'])."""
    g = geometry
    pixels = planes[0][:, : g.height * g.width * g.groups * g.channel_bytes]
    pixels = _pad_bits(pixels.unflatten(1, (g.height, g.width, g.groups, g.channel_bytes)), g).contiguous()
    popcounts = _windows(_ones(pixels).sum(-1, dtype=torch.int32), g).sum((3, 4), dtype=torch.int32)
    rows = pixels.new_zeros((g.groups, popcounts.numel() // g.groups, row_bytes(g.columns)))
    if g.channel_bytes % 8 == 0:  # eight bytes at a time
        pixels = pixels.view(torch.int64)
    found = _windows(pixels, g).permute(5, 0, 1, 2, 3, 4, 6)
    rows.view(pixels.dtype)[..., : g.columns // 8 // pixels.element_size()].view(found.shape).copy_(found)
    return rows, popcounts.flatten(0, 2).T.contiguous()


def correction(kernel_planes: Tensor, geometry: Geometry) -> Tensor | None:
    """What a product of patches lacks, float64 [H' W' or 1, O] of integers; None: nothing.

    Behind the channels both bits are 0, and add (-1) (-1) each. Where zeros pad the image the bits are 0 as well, and the
    sum of the signs under them has to be added.
    """
    g = geometry
    filler = kernel_planes.new_full((1, 1), -g.filler, dtype=torch.float64)
    if g.mode != "zeros" or not any(g.padding):
        return filler if g.filler else None
    outside = pad(kernel_planes.new_zeros((1, g.height, g.width)), g.padding, value=1)
    taps = _windows(outside, g).reshape(-1, g.kernel[0] * g.kernel[1])
    kernels = kernel_planes[0][:, : g.columns // 8].unflatten(1, (-1, g.channel_bytes)).contiguous()
    sums = 2 * _ones(kernels).sum(-1, dtype=torch.int32) - g.channels
    return taps.double() @ sums.double().T + filler  # exact, on every device
