"""`save_file`: tensors to a compressed `.safetensors` file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checksum, container
from .atomic_file import beside, replacing
from .compress import CODECS, TIERS, compress
from .compressed_tensor import CompressedTensor
from .contract import BLOCK, DTYPES, NUMBERS, P7_NUMBERS, Codec, Section
from .crc32c_combine import combined
from .errors import CorruptError
from .file_index import PLAIN, PREFIX, SUFFIX, Entry, metadata_of
from .spill import Spill

#: Tensors of fewer bytes stay as they are: their blobs would save little, and other tools can read them so.
MIN_BYTES = 65536


def save_file(
    tensors: Mapping[str, Tensor | CompressedTensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    tier: str = "storage",
    codec: str = "auto",
    *,
    min_bytes: int = MIN_BYTES,
    workers: int = 1,
    verify: bool = False,
    progress: Callable[[str, int], None] | None = None,
    low_memory: bool = False,
) -> None:
    """Write tensors to a `.safetensors` file, compressed: `load_file` gives back every bit, any tool can list the file.

    A matrix X of 16, 32 or 8-bit floats becomes the blob `X.flz` (1-D U8). Tensors of one dimension, of other dtypes, of fewer
    than `min_bytes` bytes, and those that would not shrink, stay as they are under their own name. Of tied and of equal tensors
    one is stored. The same tensors give the same bytes on every machine. The file appears under its name at once and whole: who
    is killed on the way leaves the old file, or none.

    Args:
        tensors: name -> tensor of any device, layout in memory and dtype that `compress` takes; a CompressedTensor is stored
            as it is.
        filename: where to; the folder must exist. A file that is there is replaced.
        metadata: strings of the user's; keys that begin with "fastloss." are taken.
        tier: "storage" (R8, the smallest) or "fused" (P7, decodes at the speed of memory).
        codec: "auto" (that of the tier), "r8", "p7", or "raw" (nothing is compressed, everything has a checksum).
        min_bytes: the size from which a tensor is compressed.
        workers: tensors that are compressed at the same time.
        verify: read everything back and compare it with the tensors before the file takes its name.
        progress: called with (name, bytes of the tensor) after each, and once more after each that was read back.
        low_memory: hold one tensor (of each worker) at a time. `tensors` may then be a mapping that makes them when they are
            asked for, once and once more to verify. What is compressed waits for the sizes of all others in an unnamed file
            beside `filename`: the disk needs room for both. The file becomes the same; tied tensors take their time each.

    Raises:
        TypeError: what is no tensor, a dtype or layout in memory that cannot be stored, metadata that are not strings.
        ValueError: an unknown tier or codec, a name that the container reserves, no worker.
        ImportError: the `safetensors` package is missing.
        OSError: the file cannot be written.
        CorruptError: what was read back is not what was written.
    """
    container.package()
    for what, given in (("tensors", tensors), ("metadata", {} if metadata is None else metadata)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a mapping of names, got {type(given).__name__}")
    for what, number in (("min_bytes", min_bytes), ("workers", workers)):
        if not isinstance(number, int):
            raise TypeError(f"{what} must be a whole number, got {number!r}")
    user = dict(metadata or {})
    _check(tensors, user, tier, codec, workers)
    if low_memory:
        first_of = {name: name for name in tensors}
    else:
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        first_of = _first_of_tied(tensors)

    with beside(filename) if low_memory else contextlib.nullcontext() as room:
        keep = _keep if room is None else Spill(room).keep

        def store(name: str) -> _Part:
            tensor = tensors[name]
            _check_tensor(name, tensor)
            part, how, crc = _stored(tensor, tier, codec, min_bytes)
            read = keep(container.raw_bytes(part))
            if progress is not None:
                progress(name, tensor.numel() * tensor.dtype.itemsize)
            return _Part(tensor.dtype, tuple(tensor.shape), part.dtype, tuple(part.shape), how, crc, read)

        content, entries = _index(first_of, _each(store, [n for n, first in first_of.items() if n == first], workers))
        stored = container.ordered(
            container.Stored(name, part.stored_dtype, part.stored_shape) for name, part in content.items()
        )
        with replacing(filename) as file:
            container.write(file, stored, metadata_of(entries, stored, user), (content[s.name].read() for s in stored))
            if verify:
                file.flush()
                _read_back(tensors, file.name, progress)


class _Part(NamedTuple):
    """What the container will hold of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    stored_shape: tuple[int, ...]
    codec: str
    crc32c: int
    read: Callable[[], Tensor]  # the stored bytes


def _keep(part: Tensor) -> Callable[[], Tensor]:
    """Keep a part in memory."""
    return lambda: part


def _each(store: Callable[[str], _Part], names: list[str], workers: int) -> dict[str, _Part]:
    if workers == 1:
        return {name: store(name) for name in names}
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(store, names), strict=True))


def _check(
    tensors: Mapping[str, Tensor | CompressedTensor], user: dict[str, str], tier: str, codec: str, workers: int
) -> None:
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    if codec != "auto" and codec not in CODECS:
        raise ValueError(f"codec must be 'auto' or one of {', '.join(CODECS)}, got {codec!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    for key, value in user.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must be strings, got {key!r}: {value!r}")
        if key.startswith(PREFIX):
            raise ValueError(f"metadata keys that begin with {PREFIX!r} are taken, got {key!r}")
    for name in tensors:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {name!r}")
        if name == "__metadata__":
            raise ValueError("a tensor cannot have the name '__metadata__'")


def _check_tensor(name: str, tensor: Tensor | CompressedTensor) -> None:
    if isinstance(tensor, CompressedTensor):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in DTYPES:
        raise TypeError(f"{name!r} cannot be stored: {tensor.dtype}, layout {tensor.layout}, on {tensor.device}")


def _index(first_of: Mapping[str, str], parts: dict[str, _Part]) -> tuple[dict[str, _Part], dict[str, Entry]]:
    """(what the container holds by its names there, the index)."""
    content: dict[str, _Part] = {}
    entries: dict[str, Entry] = {}
    twins: dict[tuple[object, ...], list[str]] = {}
    for name, first in first_of.items():
        if first != name:
            first = entries[first].same_as or first
            entries[name] = entries[first]._replace(same_as=first)
            continue
        part = parts.pop(name)
        candidates = twins.setdefault((part.dtype, part.shape, part.codec, part.crc32c), [])
        twin = next((c for c in candidates if torch.equal(content[entries[c].stored].read(), part.read())), None)
        if twin is not None:
            entries[name] = entries[twin]._replace(same_as=twin)
            continue
        candidates.append(name)
        stored = name if part.codec == PLAIN else _free_name(name, first_of, content)
        content[stored] = part
        entries[name] = Entry(stored, part.dtype, part.shape, part.codec, part.crc32c)
    return content, entries


def _read_back(
    tensors: Mapping[str, Tensor | CompressedTensor], path: str, progress: Callable[[str, int], None] | None
) -> None:
    from .safe_open import safe_open

    def check(name: str, tensor: Tensor | CompressedTensor) -> int:
        if isinstance(tensor, CompressedTensor):
            want, got = tensor.blob, file.get_compressed(name).blob
        else:
            want, got = tensor, file.get_tensor(name)
        if (want.dtype, want.shape) != (got.dtype, got.shape) or not _same(want, got):
            raise CorruptError("what was read back is not what was written", name)
        return tensor.numel() * tensor.dtype.itemsize

    with safe_open(path) as file:
        for name in tensors:
            count = check(name, tensors[name])  # a function, so that no tensor lives on while the next is made
            file.forget(count)
            if progress is not None:
                progress(name, count)


def _first_of_tied(tensors: Mapping[str, Tensor | CompressedTensor]) -> dict[str, str]:
    """name -> the first name of the same memory, shape and strides."""
    names: dict[tuple[object, ...], str] = {}
    first = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, CompressedTensor):
            key: tuple[object, ...] = (tensor.blob.device, tensor.blob.data_ptr())
        elif tensor.numel():
            key = (
                tensor.device,
                tensor.data_ptr(),
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
            )
        else:
            key = (name,)
        first[name] = names.setdefault(key, name)
    return first


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(container.raw_bytes(a), container.raw_bytes(b))


def _free_name(name: str, tensors: Mapping[str, object], content: Mapping[str, object]) -> str:
    name += SUFFIX
    while name in tensors or name in content:
        name += SUFFIX
    return name


def _stored(tensor: Tensor | CompressedTensor, tier: str, codec: str, min_bytes: int) -> tuple[Tensor, str, int]:
    """(what is stored, its codec, the checksum of the tensor's bytes)."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if _is_worth_it(tensor, tier, codec, min_bytes):
            compressed = compress(tensor, codec, tier)
        elif not container.can_be_plain(tensor.dtype):
            compressed = compress(tensor, "raw")
        else:
            compressed = None
        if compressed is None or (compressed.codec == Codec.RAW and container.can_be_plain(tensor.dtype)):
            plain = container.raw_bytes(tensor)
            return plain.view(tensor.dtype).reshape(tensor.shape), PLAIN, checksum.of(plain)
    else:
        compressed = tensor
    compressed = compressed.to("cpu")
    return compressed.blob, compressed.codec.name.lower(), blob_checksum(compressed)


def _is_worth_it(tensor: Tensor, tier: str, codec: str, min_bytes: int) -> bool:
    number = NUMBERS.get(tensor.dtype)
    if codec == "raw" or number is None or tensor.dim() < 2 or tensor.numel() * tensor.element_size() < min_bytes:
        return False
    uses_p7 = codec == "p7" or (codec == "auto" and tier == "fused")
    return not uses_p7 or number in P7_NUMBERS


def blob_checksum(compressed: CompressedTensor) -> int:
    """The crc32c of all numbers of a blob (in its sequence), from those of its blocks."""
    offset, count, _ = compressed.header.sections.get(Section.BLOCK_CRC, (0, 0, 0))
    crc = np.frombuffer(container.raw_bytes(compressed.blob[offset : offset + count]).numpy().tobytes(), dtype="<u4")
    item = compressed.dtype.itemsize
    return combined(crc, BLOCK * item, compressed.numel() * item)
