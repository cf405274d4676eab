"""`compress` and `decompress`: a tensor to a blob and back, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import registry
from . import checksum, header
from .compressed_tensor import CompressedTensor
from .contract import (
    BLOCK,
    DTYPES,
    LANES,
    NUMBERS,
    P7_NUMBERS,
    SLACK,
    Codec,
    Layout,
    Section,
    blocks_of,
    cost_bits,
    entropy_bits,
    has_tiles,
    padded,
    pair_table,
)
from .cpp_encode import field_counts, p7_encode_within, p7_sizes, r8_encode_within, r8_sizes, sample_plane_counts
from .cpp_r8 import frequencies
from .tiles import to_tiles

CODECS = {"raw": Codec.RAW, "p7": Codec.P7, "r8": Codec.R8}
TIERS = ("fused", "storage")
LAYOUTS = {"rows": Layout.ROWS, "tiles": Layout.TILES}
#: Bits a byte above which a byte plane is stored raw: coding it would save less than decoding costs.
WORTH_CODING = 7.6
#: Numbers up to which all of them are looked at to see whether a plane is noise; of more a sample.
_SAMPLED = 64 * BLOCK
_APART = 16
#: Bytes of a block's states, and behind its payload what whole vectors write.
_BLOCK_SPARE = 2 * LANES + SLACK


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
        verify: check every byte of the result, decoded too, before returning it.

    Raises:
        TypeError: not a dense tensor with memory of its own, or a dtype that cannot be stored.
        ValueError: an unknown codec, tier or layout, a layout that this tensor cannot have, more than 64 dimensions, or a
            shape whose extents, zeros left out, multiply to 2^62 or more.
    """
    _check(tensor, codec, tier, layout)
    chosen = _choose(tensor.dtype, codec, tier)
    if chosen == Codec.RAW or not tensor.numel():
        return _raw(_flat(tensor), tensor.shape)
    flat = _flat(tensor)
    if layout == "tiles":
        if chosen != Codec.P7 or tensor.dim() != 2 or not has_tiles(*tensor.shape):
            raise ValueError(
                "layout 'tiles' wants codec p7 and a matrix of rows a multiple of 16 and columns of 128, "
                f"got {chosen.name} of {list(tensor.shape)}"
            )
        flat = to_tiles(_integers(flat), tensor.shape[1]).view(tensor.dtype)
    parts, within = (_p7 if chosen == Codec.P7 else _r8)(flat, tensor.dim())
    coded = sum(-(-p.numel() // 64) * 64 for kind, p in parts.items() if kind != Section.BLOCK_CRC)  # raw has that too
    if coded >= flat.numel() * flat.element_size():
        return _raw(flat if layout == "rows" else _flat(tensor), tensor.shape)
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
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"layout {tensor.layout}"
        raise TypeError(f"compress takes dense tensors, got {kind} on {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"compress takes {', '.join(str(d) for d in DTYPES)}, got {tensor.dtype}")
    if codec != "auto" and codec not in CODECS:
        raise ValueError(f"codec must be 'auto' or one of {', '.join(CODECS)}, got {codec!r}")
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    header.check_shape(tensor.shape)
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


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers in row-major order; what PyTorch conjugates or negates only when it is read, as it reads."""
    flat = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() and not _address(flat):
        raise TypeError(f"compress takes tensors with memory of their own, got {type(tensor).__name__} without")
    return flat.as_strided(flat.shape, (1,))  # a single number may have any stride


def _address(flat: Tensor) -> int:
    try:
        return flat.data_ptr()
    except RuntimeError:  # tensors of torch.func, and some subclasses
        return 0


def _integers(flat: Tensor) -> Tensor:
    """The same bits as integers, so that nothing that moves them touches a NaN's payload."""
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _crc(flat: Tensor) -> Tensor:
    crc = checksum.of_blocks(flat.view(torch.uint8), BLOCK * flat.element_size())
    return crc.view(torch.uint8).view(-1, 8)[:, :4].reshape(-1)  # the low halves


def _raw(flat: Tensor, shape: Sequence[int]) -> CompressedTensor:
    parts: dict[int, Tensor] = {Section.RAW: flat.view(torch.uint8)}
    if flat.numel():
        parts[Section.BLOCK_CRC] = _crc(flat)
    return CompressedTensor(*header.build(Codec.RAW, Layout.ROWS, flat.dtype, shape, parts))


def _p7(flat: Tensor, dimensions: int) -> tuple[dict[int, Tensor], header.Room | None]:
    """The sections, and where that can be known beforehand the blob that they lie in."""
    counts = registry.run("p7_histogram", flat).cpu().numpy()
    table = torch.from_numpy(pair_table(counts)).to(flat.device)
    if registry.choose("p7_encode", flat, table) == "cpp":
        within = header.room(dimensions, p7_sizes(flat, counts, table), flat.device)
        made, crc = p7_encode_within(flat, table, within.parts)
        return made, within._replace(crc=crc)
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


def _r8(flat: Tensor, dimensions: int) -> tuple[dict[int, Tensor], header.Room | None]:
    """The sections, and where that can be known beforehand the blob that they lie in."""
    if flat.numel() > _SAMPLED and registry.choose("byte_split", flat) == "cpp" and _rest_is_noise(flat):
        return _r8_within(flat, dimensions)
    planes, bits = registry.run("byte_split", flat)
    parts: dict[int, Tensor] = {Section.BITS: bits}
    for p, plane in enumerate(planes):
        if p and _is_noise(plane, flat.numel()):
            parts[Section.BYTES0 + p - 1] = plane
            continue
        counts = registry.run("byte_histogram", plane, flat.numel()).cpu()
        if p and counts[0] == flat.numel():
            continue
        table = frequencies(counts)
        if p and cost_bits(counts.numpy(), table.numpy()) > WORTH_CODING * flat.numel():
            parts[Section.BYTES0 + p - 1] = plane
            continue
        table = table.to(flat.device)
        offsets, data = registry.run("r8_encode", plane, table, flat.numel())
        first = Section.FIELD_FREQUENCIES + 3 * p
        parts |= {first: table, first + 1: offsets.view(torch.uint8), first + 2: data}
    return parts, None


def _r8_within(flat: Tensor, dimensions: int) -> tuple[dict[int, Tensor], header.Room]:
    """On a CPU, where the field alone is coded: the numbers are read twice, for counts and to be written to the blob."""
    counts = field_counts(flat)
    table = frequencies(counts)
    block_crc = torch.empty(blocks_of(flat.numel()), dtype=torch.int32, device="cpu")
    for most in (
        _likely_bytes(counts.numpy(), table.numpy()),
        2 * padded(flat.numel()) + _BLOCK_SPARE * blocks_of(flat.numel()),
    ):
        within = header.room(dimensions, r8_sizes(flat, most), flat.device)
        if made := r8_encode_within(flat, table, within.parts, block_crc):
            break
    else:
        raise RuntimeError("R8 takes two bytes a number at most")
    written, crc = made
    within = header.room(dimensions, r8_sizes(flat, written), flat.device, within.memory, crc)
    return {**within.parts, Section.BLOCK_CRC: block_crc.view(torch.uint8)}, within


def _likely_bytes(counts: np.ndarray, freq: np.ndarray) -> int:
    """A few more bytes than R8 takes: 1/256 for what its integers round, and half a byte a state."""
    coded = cost_bits(counts, freq) / 8
    return int(coded * (1 + 1 / 256)) + (_BLOCK_SPARE + LANES) * blocks_of(int(counts.sum())) + BLOCK


def _sample(x: Tensor) -> Tensor:
    """One block in _APART of more than _SAMPLED numbers."""
    if x.numel() <= _SAMPLED:
        return x
    return x[: x.numel() // (_APART * BLOCK) * _APART * BLOCK].reshape(-1, _APART, BLOCK)[:, 0].reshape(-1)


def _is_noise(plane: Tensor, numel: int) -> bool:
    """Whether the sample has an entropy that no code gets below: most mantissas."""
    sample = _sample(plane[:numel])
    return _are_noise(registry.run("byte_histogram", sample, sample.numel()).cpu().numpy())


def _are_noise(counts: np.ndarray) -> bool:
    return entropy_bits(counts) > (WORTH_CODING + 1e-6) * int(counts.sum())


def _rest_is_noise(flat: Tensor) -> bool:
    """Whether `_is_noise` is true of every byte plane of more than _SAMPLED numbers."""
    return all(
        _are_noise(counts) for counts in sample_plane_counts(flat, flat.numel() // (_APART * BLOCK), _APART).numpy()
    )
