"""`compress` and `decompress`: a tensor to a blob and back, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from . import checksum, header
from .compressed_tensor import CompressedTensor
from .contract import (
    BLOCK,
    DTYPES,
    NUMBERS,
    P7_NUMBERS,
    Codec,
    Layout,
    Section,
    blocks_of,
    cost_bits,
    entropy_bits,
    frequencies,
    has_tiles,
    pair_table,
)
from .cpp_encode import p7_encode_within, p7_sizes
from .tiles import to_tiles

CODECS = {"raw": Codec.RAW, "p7": Codec.P7, "r8": Codec.R8}
TIERS = ("fused", "storage")
LAYOUTS = {"rows": Layout.ROWS, "tiles": Layout.TILES}
#: Bits a byte above which a byte plane is stored raw: coding it would save less than decoding costs.
WORTH_CODING = 7.6


def compress(
    tensor: Tensor, codec: str = "auto", tier: str = "fused", layout: str = "rows", verify: bool = False
) -> CompressedTensor:
    """The tensor as a blob on its own device; `decompress` gives back every bit of it, NaN payloads and -0 included.

    Args:
        tensor: any shape and dtype. bf16, fp16, fp32 and fp8 are coded, others are stored raw.
        codec: "p7" (7 bits a pair of exponents: decodes at the speed of memory, multiplies without being decoded;
            bf16, fp16, fp32), "r8" (rANS: within 0.02 bits of the entropy; also fp8), "raw", or "auto": the codec of the tier.
            What would come out larger than raw is stored raw, whatever is asked.
        tier: "fused" (P7; fp8 raw) or "storage" (R8); of account only for codec "auto".
        layout: "rows", or "tiles", in which a GPU's fused product reads P7 (2-D, rows a multiple of 16, columns of 128).
        verify: decode the result and compare before returning it.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be stored.
        ValueError: an unknown codec, tier or layout, or a layout that this tensor cannot have.
    """
    _check(tensor, codec, tier, layout)
    chosen = _choose(tensor.dtype, codec, tier)
    if chosen == Codec.RAW or not tensor.numel():
        return _raw(tensor)
    flat = tensor.detach().contiguous().reshape(-1)
    if layout == "tiles":
        if chosen != Codec.P7 or tensor.dim() != 2 or not has_tiles(*tensor.shape):
            raise ValueError(
                "layout 'tiles' wants codec p7 and a matrix of rows a multiple of 16 and columns of 128, "
                f"got {chosen.name} of {list(tensor.shape)}"
            )
        flat = to_tiles(_integers(flat), tensor.shape[1]).view(tensor.dtype)
    parts, within = _p7(flat, tensor.dim()) if chosen == Codec.P7 else (_r8(flat), None)
    if sum(-(-p.numel() // 64) * 64 for p in parts.values()) >= flat.numel() * flat.element_size():
        return _raw(tensor)
    if Section.BLOCK_CRC not in parts:
        parts[Section.BLOCK_CRC] = _crc(flat)
    compressed = CompressedTensor(*header.build(chosen, LAYOUTS[layout], tensor.dtype, tensor.shape, parts, within))
    if verify:
        compressed.verify()
    return compressed


def decompress(compressed: CompressedTensor, out: Tensor | None = None, verify: str = "full") -> Tensor:
    """The tensor that was compressed, bit for bit, on the blob's device.

    Args:
        compressed: what `compress` returned or a file held.
        out: a tensor of that shape, dtype and device to write into; it is left as it was when the blob is corrupt.
        verify: "full" checks the crc32c of every block of decoded numbers; "header" and "off" decode without (the header
            was checked when the blob was opened).

    Raises:
        CorruptError: damaged bytes.
        TypeError, ValueError: an `out` that does not fit, or an unknown `verify`.
    """
    if not isinstance(compressed, CompressedTensor):
        raise TypeError(f"decompress takes a CompressedTensor, got {type(compressed).__name__}")
    return compressed.decompress(out, verify)


def _check(tensor: Tensor, codec: str, tier: str, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"compress takes a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"compress takes dense tensors, got layout {tensor.layout} on {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"compress takes {', '.join(str(d) for d in DTYPES)}, got {tensor.dtype}")
    if codec != "auto" and codec not in CODECS:
        raise ValueError(f"codec must be 'auto' or one of {', '.join(CODECS)}, got {codec!r}")
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def _choose(dtype: torch.dtype, codec: str, tier: str) -> Codec:
    number = NUMBERS.get(dtype)
    chosen = CODECS.get(codec, Codec.P7 if tier == "fused" else Codec.R8)
    if number is None or (chosen == Codec.P7 and number not in P7_NUMBERS):
        if codec == "p7":
            raise ValueError(f"codec 'p7' takes bf16, fp16 and fp32, got {dtype}")
        return Codec.RAW
    return chosen


def _integers(flat: Tensor) -> Tensor:
    """The same bits as integers, so that nothing that moves them touches a NaN's payload."""
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _crc(flat: Tensor) -> Tensor:
    crc = checksum.of_blocks(flat.view(torch.uint8), BLOCK * flat.element_size())
    return torch.where(crc >= 1 << 31, crc - (1 << 32), crc).to(torch.int32).view(torch.uint8)


def _raw(tensor: Tensor) -> CompressedTensor:
    flat = tensor.detach().contiguous().reshape(-1)
    parts: dict[int, Tensor] = {Section.RAW: flat.view(torch.uint8)}
    if flat.numel():
        parts[Section.BLOCK_CRC] = _crc(flat)
    return CompressedTensor(*header.build(Codec.RAW, Layout.ROWS, tensor.dtype, tensor.shape, parts))


def _p7(flat: Tensor, dimensions: int) -> tuple[dict[int, Tensor], header.Room | None]:
    """The sections, and where that can be known beforehand the blob that they lie in."""
    counts = registry.run("p7_histogram", flat).cpu().numpy()
    table = torch.from_numpy(pair_table(counts)).to(flat.device)
    if registry.choose("p7_encode", flat, table) == "cpp":
        within = header.room(dimensions, p7_sizes(flat, counts, table), flat.device)
        return p7_encode_within(flat, table, within.parts), within
    codes, planes, bits, offsets, positions, values = registry.run("p7_encode", flat, table)
    parts: dict[int, Tensor] = {
        Section.TABLE: table,
        Section.CODES: codes,
        Section.ESCAPE_OFFSETS: offsets.view(torch.uint8),
        Section.ESCAPE_POSITIONS: positions.view(torch.uint8),
        Section.ESCAPE_VALUES: values.view(torch.uint8),
        Section.BITS: bits,
    }
    for p, plane in enumerate(planes):
        if bool(plane.any()):
            parts[Section.BYTES0 + p] = plane
    return parts, None


def _r8(flat: Tensor) -> dict[int, Tensor]:
    planes, bits = registry.run("byte_split", flat)
    parts: dict[int, Tensor] = {Section.BITS: bits}
    for p, plane in enumerate(planes):
        if p and _is_noise(plane, flat.numel()):
            parts[Section.BYTES0 + p - 1] = plane
            continue
        counts = registry.run("byte_histogram", plane, flat.numel()).cpu().numpy()
        if p and counts[0] == flat.numel():
            continue
        freq = frequencies(counts)
        if p and cost_bits(counts, freq) > WORTH_CODING * flat.numel():
            parts[Section.BYTES0 + p - 1] = plane
            continue
        table = torch.from_numpy(freq).to(flat.device)
        offsets, data = registry.run("r8_encode", plane, table, flat.numel())
        first = Section.FIELD_FREQUENCIES + 3 * p
        parts |= {first: table, first + 1: offsets.view(torch.uint8), first + 2: data}
    return parts


def _is_noise(plane: Tensor, numel: int) -> bool:
    """Whether one block in sixteen (up to 64 blocks all of them) has an entropy that no code gets below: most mantissas."""
    blocks = blocks_of(numel)
    if blocks > 64:
        plane = plane[: blocks // 16 * 16 * BLOCK].reshape(-1, 16, BLOCK)[:, 0].reshape(-1)
        numel = plane.numel()
    counts = registry.run("byte_histogram", plane, numel).cpu().numpy()
    return entropy_bits(counts) > (WORTH_CODING + 1e-6) * numel
