"""What a compressed `.safetensors` file says of its tensors: written into its metadata, read and held against the file.

    "fastloss.flz": "1"           the major version of this layout
    "fastloss.tensors": JSON      {name: {"stored", "dtype", "shape", "codec", "crc32c"}}; "stored" where it is not the name;
                                  {"same_as", "dtype", "shape"} where another tensor has the same bytes
    "fastloss.crc32c": decimal    of the canonical form: every stored tensor's name, dtype, shape, and all other metadata

`crc32c` is that of the tensor's bytes in the order in which they are stored (row-major, but for a blob in layout tiles).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from . import container
from .contract import DTYPES
from .errors import CorruptError, FormatError

PREFIX = "fastloss."
VERSION, TENSORS, CHECKSUM = "fastloss.flz", "fastloss.tensors", "fastloss.crc32c"
MAJOR = 1
SUFFIX = ".flz"
#: The codec of a tensor that stands in the container as it is.
PLAIN = "plain"
CODECS = (PLAIN, "raw", "p7", "r8")
_DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_MOST_NUMBERS = 1 << 62


class Entry(NamedTuple):
    """One tensor of a file, under the name that its user knows."""

    stored: str  # the name in the container; that of the other tensor where `same_as`
    dtype: torch.dtype
    shape: tuple[int, ...]
    codec: str
    crc32c: int
    same_as: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor when it is decoded."""
        return math.prod(self.shape) * self.dtype.itemsize


def metadata_of(
    entries: Mapping[str, Entry], stored: Iterable[container.Stored], user: Mapping[str, str]
) -> dict[str, str]:
    """The whole metadata of a file: the user's and ours."""
    tensors: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        tensors[name] = {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
        if entry.same_as is not None:
            tensors[name]["same_as"] = entry.same_as
            continue
        if entry.stored != name:
            tensors[name]["stored"] = entry.stored
        tensors[name] |= {"codec": entry.codec, "crc32c": entry.crc32c}
    metadata = {**user, VERSION: str(MAJOR), TENSORS: container.compact(tensors)}
    canonical = [(s.name, container.NAMES[s.dtype], list(s.shape)) for s in stored]
    metadata[CHECKSUM] = str(container.canonical_checksum(canonical, metadata))
    return metadata


def user_metadata(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """The metadata without what is ours; None where nothing is left."""
    return {k: v for k, v in (metadata or {}).items() if not k.startswith(PREFIX)} or None


def read(
    stored: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str] | None, check: bool = True
) -> dict[str, Entry] | None:
    """The entries of a file whose container holds `stored` (name -> dtype's name, shape); None of an ordinary file.

    Raises FormatError for an unknown major version, CorruptError where checksum (unless `check` is false), index and container
    contradict each other.
    """
    metadata = metadata or {}
    if not any(key.startswith(PREFIX) for key in metadata):
        return None
    for key in (VERSION, TENSORS, CHECKSUM):
        if key not in metadata:
            raise CorruptError(f"the file's metadata has fastloss entries, but no {key!r}")
    major = metadata[VERSION].split(".")[0]
    if major != str(MAJOR):
        raise FormatError(
            f"this file is of fastloss format {metadata[VERSION]!r}; this release reads {MAJOR}.x: install a newer one"
        )
    if check:
        others = {key: value for key, value in metadata.items() if key != CHECKSUM}
        want = container.canonical_checksum([(n, d, s) for n, (d, s) in stored.items()], others)
        if metadata[CHECKSUM] != str(want):
            raise CorruptError("the checksum of the file's header and metadata is wrong")
    entries = _entries(metadata[TENSORS])
    _check_stored(entries, stored)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entries(text: str) -> dict[str, Entry]:
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the index of tensors is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CorruptError("the index of tensors is no JSON object")
    entries = {name: _entry(name, fields) for name, fields in raw.items() if "same_as" not in _fields(name, fields)}
    for name, fields in raw.items():
        if "same_as" in fields:
            first = fields["same_as"]
            if set(fields) != {"same_as", "dtype", "shape"} or not isinstance(first, str) or first not in entries:
                raise CorruptError("is said to be the same as a tensor that is not stored", name)
            twin = entries[first]
            if _dtype(name, fields) != twin.dtype or _shape(name, fields) != twin.shape:
                raise CorruptError(f"is said to be the same as {first!r}, which has another dtype or shape", name)
    return {
        name: entries[name] if name in entries else entries[fields["same_as"]]._replace(same_as=fields["same_as"])
        for name, fields in raw.items()
    }


def _fields(name: str, fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise CorruptError("its entry in the index is no JSON object", name)
    return fields


def _dtype(name: str, fields: dict[str, Any]) -> torch.dtype:
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPE_OF:
        raise CorruptError(f"unknown dtype {dtype!r:.80}", name)
    return _DTYPE_OF[dtype]


def _shape(name: str, fields: dict[str, Any]) -> tuple[int, ...]:
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) > 64 or any(type(d) is not int or not 0 <= d < 1 << 62 for d in shape):
        raise CorruptError("its shape is no list of sizes", name)
    if math.prod(max(d, 1) for d in shape) >= _MOST_NUMBERS:
        raise CorruptError("its shape has more numbers than any memory", name)
    return tuple(shape)


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    if not {"dtype", "shape", "codec", "crc32c"} <= set(fields) <= {"stored", "dtype", "shape", "codec", "crc32c"}:
        raise CorruptError("its entry in the index has missing or unknown fields", name)
    stored, codec, crc = fields.get("stored", name), fields["codec"], fields["crc32c"]
    if not isinstance(stored, str) or not isinstance(codec, str) or codec not in CODECS:
        raise CorruptError(f"unknown codec {codec!r:.80}, or no stored name", name)
    if type(crc) is not int or not 0 <= crc < 1 << 32:
        raise CorruptError("its checksum is no number of 32 bits", name)
    return Entry(stored, _dtype(name, fields), _shape(name, fields), codec, crc)


def _check_stored(entries: Mapping[str, Entry], stored: Mapping[str, tuple[str, list[int]]]) -> None:
    taken: set[str] = set()
    for name, entry in entries.items():
        if entry.same_as is not None:
            continue
        if entry.stored not in stored:
            raise CorruptError(f"the file holds no {entry.stored!r}", name)
        if entry.stored in taken:
            raise CorruptError(f"{entry.stored!r} is stored for two tensors", name)
        taken.add(entry.stored)
        dtype, shape = stored[entry.stored]
        if entry.codec == PLAIN:
            if container.NAMES.get(entry.dtype) != dtype or list(entry.shape) != shape:
                raise CorruptError(f"stored as {dtype} {shape}, but said to be {entry.dtype} {list(entry.shape)}", name)
        elif dtype != "U8" or len(shape) != 1:
            raise CorruptError(f"a blob is stored as 1-D U8, not as {dtype} {shape}", name)
    if left := set(stored) - taken:
        raise CorruptError(f"the file holds {min(left)!r}, which its index does not know")
