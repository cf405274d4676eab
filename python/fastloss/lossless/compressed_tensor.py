"""`CompressedTensor`: a tensor as a blob, and what can be done with it."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import kept_memory, registry
from . import checksum, header
from .contract import BLOCK, SLACK, Codec, Layout, Section, blocks_of
from .errors import CorruptError

VERIFY = ("full", "header", "off")


def check_verify(verify: str) -> None:
    """Raise ValueError unless `verify` is one of VERIFY."""
    if verify not in VERIFY:
        raise ValueError(f"verify must be one of {', '.join(VERIFY)}, got {verify!r}")


class CompressedTensor:
    """A tensor stored as a blob of bytes, bit for bit the same when it is decoded.

    Args:
        blob: 1-D uint8, on any device: what `compress` returned, or a file holds.

    Raises FormatError or CorruptError where the blob is not one; the content of its sections is checked by `verify`
    and by `decompress(verify="full")`.
    """

    __slots__ = ("blob", "header", "plan")

    def __init__(self, blob: Tensor, known: header.Header | None = None) -> None:
        self.header = header.read(blob) if known is None else known
        self.blob = blob
        self.plan = self.header.plan()

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return torch.Size(self.header.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return self.header.dtype

    @property
    def codec(self) -> Codec:
        """RAW, P7 or R8."""
        return self.header.codec

    @property
    def layout(self) -> Layout:
        """ROWS or TILES."""
        return self.header.layout

    @property
    def device(self) -> torch.device:
        """Where the blob lies, and the decoded tensor will."""
        return self.blob.device

    @property
    def nbytes(self) -> int:
        """The bytes of the blob, metadata included."""
        return self.header.bytes

    def numel(self) -> int:
        """The number of numbers."""
        return self.header.numel

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CompressedTensor:
        """The same blob on `device`."""
        return CompressedTensor(self.blob.to(device, non_blocking=non_blocking), self.header)

    def map(self, function: Callable[[Tensor], Tensor]) -> CompressedTensor:
        """The same header with the blob that `function` makes of this one, which must keep its bytes."""
        return CompressedTensor(function(self.blob), self.header)

    def decompress(self, out: Tensor | None = None, verify: str = "full") -> Tensor:
        """The tensor. See `fastloss.lossless.decompress`."""
        check_verify(verify)
        if out is not None:
            _check_out(self, out)
        if verify == "full":
            self._check_content()
        if out is None:
            return self._decoded(verify == "full")
        if verify == "full":  # before the first number is written: the caller's tensor stays as it is
            self._check_numbers()
        lazy = out.is_neg() or out.is_conj()  # it reads as something else than its memory holds
        direct = out.is_contiguous() and not lazy
        if not direct or not registry.able("lossless_decode_into", self.blob, self.plan, out.view(-1)):
            return out.copy_(self._decoded(False))
        registry.run("lossless_decode_into", self.blob, self.plan, out.view(-1))
        torch.autograd.graph.increment_version(out)  # as any operation in place, for a graph that has saved it
        return out

    def _check_numbers(self) -> None:
        """Raise CorruptError where a block's checksum is wrong; on a CPU no decoded number leaves the cache."""
        if not self.numel():
            return
        if registry.able("lossless_verify", self.blob, self.plan, self.dtype):
            self._refuse(registry.run("lossless_verify", self.blob, self.plan, self.dtype))
        else:
            self._decoded(True)

    def _decoded(self, checked: bool) -> Tensor:
        if not checked or not self.numel():
            flat = torch.ops.fastloss.lossless_decode(self.blob, self.plan, 0, self.numel(), self.dtype)
            return flat.reshape(self.shape)
        flat = kept_memory.empty_beside(self.blob, (self.numel(),), self.dtype)
        self._refuse(registry.run("lossless_decode_checked", self.blob, self.plan, flat))
        return flat.reshape(self.shape)

    def _refuse(self, bad: int) -> None:
        if bad >= 0:
            raise CorruptError("the checksum of the numbers is wrong", block=bad)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix [..., columns] by an integer tensor of any shape: [*index.shape, columns].

        Only the touched rows are decoded. Raises IndexError (on a CPU) for a row that there is not.
        """
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be an integer tensor, got {type(index).__name__}")
        flat = torch.ops.fastloss.lossless_rows(self.blob, self.plan, index.reshape(-1), self.dtype)
        return flat.reshape(*index.shape, self.header.matrix[1])

    def block(self, number: int) -> Tensor:
        """The numbers of one block of 16,384 (1-D, sequence order for layout ROWS).

        Raises IndexError where there is no such block.
        """
        blocks, number = blocks_of(self.numel()), operator.index(number)
        if not 0 <= number < blocks:
            raise IndexError(f"block {number} is out of range: there are {blocks}")
        first = number * BLOCK
        count = min(BLOCK, self.numel() - first)
        return torch.ops.fastloss.lossless_decode(self.blob, self.plan, first, count, self.dtype)

    def verify(self) -> None:
        """Raise CorruptError unless every byte of the blob, and every decoded number, is as it was written."""
        fresh = header.read(self.blob)
        end = header._aligned(header._header_bytes(len(fresh.shape), len(fresh.sections)))
        head = len(header.write(fresh))
        gaps = [(head, end)]
        for kind, (offset, count, crc) in fresh.sections.items():
            if checksum.of(self.blob[offset : offset + count]) != crc:
                raise CorruptError(f"the checksum of section {Section(kind).name} is wrong")
            end = header._aligned(offset + count)
            gaps.append((offset + count, end))
        gaps.append((end, end + SLACK))
        if any(bool(self.blob[a:b].any()) for a, b in gaps):
            raise CorruptError("bytes between sections are not zero")
        self._check_content()
        self._check_numbers()

    def _check_content(self) -> None:
        """Raise CorruptError where tables and offsets contradict the contract (kernels survive it; numbers do not)."""
        sections = self.header.sections
        if self.blob.is_meta:
            raise ValueError("a blob on the meta device has no bytes that could be checked: verify='off'")

        def part(kind: int) -> np.ndarray:
            offset, count, _ = sections[kind]
            return np.ascontiguousarray(self.blob[offset : offset + count].cpu().numpy())

        for kind in range(Section.FIELD_FREQUENCIES, Section.RAW, 3):
            if kind in sections:
                if not 1 <= int(part(kind).sum()) <= 255:
                    raise CorruptError(f"section {Section(kind).name} does not share 256 slots")
                _check_offsets(part(kind + 1), sections[kind + 2][1], kind + 1)
        if Section.ESCAPE_OFFSETS in sections:
            escapes = sections.get(Section.ESCAPE_POSITIONS, (0, 0, 0))[1] // 2
            _check_offsets(part(Section.ESCAPE_OFFSETS), escapes, Section.ESCAPE_OFFSETS)

    def __repr__(self) -> str:
        dense = self.numel() * self.dtype.itemsize
        share = f", {100 * self.nbytes / dense:.1f} %" if dense else ""
        return (
            f"CompressedTensor(shape={list(self.shape)}, dtype={self.dtype}, codec={self.codec.name}, "
            f"layout={self.layout.name}, device={self.device}, {self.nbytes} bytes{share})"
        )


def _check_offsets(raw: np.ndarray, total: int, kind: int) -> None:
    offsets = raw.view("<i8")
    if offsets[0] != 0 or offsets[-1] != total or (offsets[1:] < offsets[:-1]).any():
        raise CorruptError(f"section {Section(kind).name} does not rise from 0 to {total}")


def _check_out(compressed: CompressedTensor, out: Tensor) -> None:
    if not isinstance(out, Tensor) or out.layout != torch.strided:
        kind = out.layout if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"out must be a dense tensor, got {kind}")
    if out.dtype != compressed.dtype:
        raise TypeError(f"out must be {compressed.dtype}, got {out.dtype}")
    if out.shape != compressed.shape:
        raise ValueError(f"out must have shape {list(compressed.shape)}, got {list(out.shape)}")
    if out.device != compressed.device:
        raise ValueError(f"out must be on {compressed.device}, got {out.device}")
    if out.requires_grad:
        raise ValueError("out must not require a gradient: decoded numbers have none")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out must have memory for each of its numbers, got strides {list(out.stride())}")
    if _overlap(compressed.blob, out):
        raise ValueError("out must not share memory with the blob: numbers would be written over bytes not yet read")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the two span common bytes, those between their elements counted."""

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    if not a.numel() or not b.numel() or a.device.type == "meta":
        return False
    (first, end), (other_first, other_end) = span(a), span(b)
    return first < other_end and other_first < end
