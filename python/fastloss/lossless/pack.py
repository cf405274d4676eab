"""Checkpoints as files: pack, unpack and compare one `.safetensors` file or a folder of shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import container
from .atomic_file import is_temporary, replacing
from .errors import CorruptError, FormatError
from .file_index import PLAIN, VERSION
from .safe_open import safe_open
from .save_file import save_file

#: Called with (name of the tensor, its bytes) after each.
Progress = Callable[[str, int], None]
INDEX_SUFFIX = ".safetensors.index.json"
#: The entry of a packed folder's index with the bytes that its tensors have in the files.
STORED_SIZE = "fastloss.stored_size"


class DifferError(ValueError):
    """Two files that should hold the same tensors do not."""


def shards(folder: Path) -> list[Path]:
    """The `.safetensors` files of a folder and its subfolders, relative to it."""
    return sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors") if _is_file(p))


def _is_file(path: Path) -> bool:
    """Whether this is a file, or a link to one that is missing: to leave that out would lose a part of the model silently."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def other_files(folder: Path) -> list[Path]:
    """What goes along unchanged: all files but shards, indexes of shards and what killed writers left."""
    found = (p for p in folder.rglob("*") if _is_file(p) and p.suffix != ".safetensors")
    kept = (p for p in found if not p.name.endswith(INDEX_SUFFIX) and not is_temporary(p.name))
    return sorted(p.relative_to(folder) for p in kept)


def indexes(folder: Path) -> list[Path]:
    """The `*.safetensors.index.json` of a folder and its subfolders, relative to it."""
    return sorted(p.relative_to(folder) for p in folder.rglob("*" + INDEX_SUFFIX) if _is_file(p))


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor that is packed: floating-point numbers of 16 bits and more in `dtype`, where one is asked for."""
    wide = tensor.is_floating_point() and tensor.element_size() >= 2
    return tensor.to(dtype) if dtype is not None and wide else tensor


def pack(
    source: Path, target: Path, tier: str = "storage", codec: str = "auto", dtype: torch.dtype | None = None,
    workers: int = 1, verify: bool = True, progress: Progress | None = None,
) -> None:  # fmt: skip
    """`source`, any `.safetensors` file, compressed to `target`; `dtype` rounds its floating-point numbers first.

    One tensor is in memory at a time, or one of each worker.
    """
    with safe_open(source) as file:
        save_file(
            _OneByOne(file, dtype), target, file.metadata(), tier, codec, workers=workers, verify=verify, progress=progress,
            low_memory=True,
        )  # fmt: skip


class _OneByOne(Mapping[str, Tensor]):
    """The tensors of a file, read whenever they are asked for."""

    def __init__(self, file: safe_open, dtype: torch.dtype | None) -> None:
        self._file, self._dtype, self._names = file, dtype, file.keys()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._file.get_tensor(name)
        self._file.forget(tensor.numel() * tensor.element_size())
        return cast(tensor, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def unpack(source: Path, target: Path, progress: Progress | None = None) -> None:
    """`source` as an ordinary `.safetensors` file, every tensor bit for bit and the user's metadata; each checked on the way.

    What the `safetensors` package wrote comes back byte for byte, up to the order of more than one entry of metadata.
    Raises FormatError where a tensor's dtype has no name in such files.
    """
    with safe_open(source) as file:
        stored = []
        for name in file.keys():
            kind = file.get_slice(name)
            if kind.get_dtype() not in _DTYPES:
                raise FormatError(f"tensor {name!r}: {kind.get_dtype()} cannot be written to an ordinary file")
            stored.append(container.Stored(name, _DTYPES[kind.get_dtype()], tuple(kind.get_shape())))
        stored = container.ordinary(stored)

        def content() -> Iterator[Tensor]:
            for entry in stored:
                yield file.get_tensor(entry.name)
                file.forget(entry.nbytes)
                if progress is not None:
                    progress(entry.name, entry.nbytes)

        with replacing(target) as out:
            container.write(out, stored, file.metadata() or {}, content(), container.ORDINARY_ALIGNMENT)


_DTYPES = {name: dtype for dtype, name in container.NAMES.items()}


def compare(source: Path, packed: Path, dtype: torch.dtype | None = None, progress: Progress | None = None) -> None:
    """Raise DifferError unless `packed` holds `source`'s tensors (rounded to `dtype`) bit for bit and its metadata.

    Raises CorruptError where one of them is damaged.
    """
    with safe_open(source) as a, safe_open(packed) as b:
        if set(a.keys()) != set(b.keys()):
            raise DifferError(f"{packed} has other tensors than {source}: {min(set(a.keys()) ^ set(b.keys()))!r}")
        if a.metadata() != b.metadata():
            raise DifferError(f"{packed} has other metadata than {source}")
        for name in a.keys():
            want, got = cast(a.get_tensor(name), dtype), b.get_tensor(name)
            if (want.dtype, want.shape) != (got.dtype, got.shape) or not torch.equal(
                container.raw_bytes(want), container.raw_bytes(got)
            ):
                raise DifferError(f"tensor {name!r} of {packed} is not that of {source}")
            for file in (a, b):
                file.forget(got.numel() * got.element_size())
            if progress is not None:
                progress(name, got.numel() * got.element_size())


def is_done(source: Path, target: Path, codec: str | None, dtype: torch.dtype | None = None) -> bool:
    """Whether `target` is there and whole, holds what `source` does, and is what was asked for: packed by `codec`, or (None)
    an ordinary file."""
    try:
        with safe_open(target, verify="header") as file:
            found = {entry.codec for name in file.keys() if (entry := file.entry(name))}
            if file.is_compressed != (codec is not None) or not found <= {PLAIN, "raw", codec}:
                return False
        compare(source, target, dtype)
    except (CorruptError, DifferError, FormatError, FileNotFoundError):
        return False
    return True


def is_packed(path: Path) -> bool:
    """Whether `save_file` wrote this file."""
    with safe_open(path, verify="header") as file:
        return file.is_compressed


def dense_bytes(path: Path) -> int:
    """The bytes of a file's tensors when they are decoded."""
    with safe_open(path, verify="header") as file:
        entries = [file.entry(name) for name in file.keys()]
        if None not in entries:
            return sum(entry.nbytes for entry in entries if entry is not None)
        return sum(file.get_stored(name).numel() for name in file.keys())


def write_index(source: Path, target: Path, pack: bool, dtype: torch.dtype | None) -> None:
    """The index of a folder's shards for the packed (or unpacked) folder: the same names in the same files.

    `weight_map` lists tensors as `safe_open` does, whatever they are stored as; "total_size" is that of the decoded tensors.
    """
    try:
        index: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        files = sorted({target.parent / str(name) for name in index["weight_map"].values()})
        metadata = index.setdefault("metadata", {})
        metadata.pop(VERSION, None)
        metadata.pop(STORED_SIZE, None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{source} is no index of shards") from None
    if dtype is not None:
        metadata["total_size"] = sum(dense_bytes(file) for file in files)
    if pack:
        metadata |= {VERSION: "1", STORED_SIZE: sum(file.stat().st_size for file in files)}
    with replacing(target) as out:
        out.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def is_index_of(index: Path, source: Path) -> bool:
    """Whether `index` lists the same tensors in the same files as `source`, whatever it says of their sizes."""
    try:
        maps = [json.loads(path.read_text(encoding="utf-8"))["weight_map"] for path in (index, source)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(maps[0] == maps[1])


def copy(source: Path, target: Path) -> None:
    """A copy of a file that is there whole or not at all."""
    with open(source, "rb") as content, replacing(target) as out:
        shutil.copyfileobj(content, out)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    if not b.is_file() or os.path.getsize(a) != os.path.getsize(b):
        return False
    with open(a, "rb") as first, open(b, "rb") as second:
        while part := first.read(1 << 20):
            if part != second.read(1 << 20):
                return False
    return True
