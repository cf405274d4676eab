"""`TensorSlice`: indexing of a stored tensor that decodes only the blocks it touches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checksum
from .compressed_tensor import CompressedTensor
from .container import NAMES
from .contract import BLOCK, Layout, Section
from .errors import CorruptError


class TensorSlice:
    """What `safe_open.get_slice` returns: `part[index]` is `tensor[index]`, bit for bit.

    An integer or a slice in the first place decodes only the blocks of these rows; anything else decodes everything.
    """

    def __init__(self, name: str, source: CompressedTensor | Tensor, device: torch.device, verify: str) -> None:
        self._name, self._source, self._device, self._verify = name, source, device, verify

    def get_shape(self) -> list[int]:
        """The shape of the tensor."""
        return list(self._source.shape)

    def get_dtype(self) -> str:
        """The dtype of the tensor by its name in `.safetensors` files (torch's where it has none there)."""
        return NAMES.get(self._source.dtype, str(self._source.dtype).removeprefix("torch."))

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(self._source, Tensor):
            return self._source[index].to(self._device, copy=True)
        try:
            return self._decoded(self._source, index)
        except CorruptError as error:
            raise error.within(self._name) from None

    def _decoded(self, source: CompressedTensor, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if not source.shape or not (isinstance(first, slice) or type(first) is int) or not source.numel():
            return source.to(self._device).decompress(verify=self._verify)[index]
        rows = source.shape[0]
        if isinstance(first, slice):
            asked = range(*first.indices(rows))
            if asked.step < 0:
                raise ValueError(f"slices must have a positive step, got {asked.step}")
            begin, end = asked.start, max(asked.stop, asked.start)
            first = slice(None, None, asked.step)
        else:
            if not -rows <= first < rows:
                raise IndexError(f"row {first} is out of bounds: tensor {self._name!r} has {rows}")
            begin = first % rows
            end, first = begin + 1, 0
        key = (first, *rest)
        return self._rows(source, begin, end)[key].clone()

    def _rows(self, source: CompressedTensor, begin: int, end: int) -> Tensor:
        """Rows begin..end of the first dimension."""
        width = math.prod(source.shape[1:])
        shape = (end - begin, *source.shape[1:])
        if source.layout == Layout.TILES:  # blocks do not end where rows do
            return source.to(self._device).decompress(verify=self._verify)[begin:end]
        low, high = begin * width, end * width
        start = low // BLOCK * BLOCK
        stop = min(-(-high // BLOCK) * BLOCK, source.numel()) if high > low else start
        blob = source.blob.to(self._device)
        flat = torch.ops.fastloss.lossless_decode(blob, source.plan, start, stop - start, source.dtype)
        if self._verify == "full" and flat.numel():
            self._check(source, flat, start // BLOCK)
        return flat[low - start : high - start].reshape(shape)

    def _check(self, source: CompressedTensor, flat: Tensor, block: int) -> None:
        found = checksum.of_blocks(flat.view(torch.uint8), BLOCK * source.dtype.itemsize).cpu()
        offset, count, _ = source.header.sections[Section.BLOCK_CRC]
        want = source.blob[offset : offset + count].cpu().clone().view(torch.int32)[block : block + found.numel()]
        wrong = (found != want.to(torch.int64) & 0xFFFFFFFF).nonzero()
        if wrong.numel():
            raise CorruptError("the checksum of the numbers is wrong", block=block + int(wrong[0]))
