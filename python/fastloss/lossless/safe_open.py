"""`safe_open`: a compressed `.safetensors` file whose tensors are decoded one by one, or in slices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import checksum, container, file_index
from .compress import compress
from .compressed_tensor import CompressedTensor, check_verify
from .errors import CorruptError, FormatError
from .file_index import PLAIN, SUFFIX, Entry
from .header import MAGIC
from .save_file import blob_checksum
from .tensor_slice import TensorSlice

_FRAMEWORKS = ("pt", "torch", "pytorch")
#: Bytes read after which `forget` opens the file anew.
_FORGET = 64 << 20


class safe_open:
    """A file that `save_file` wrote, or any other `.safetensors` file, opened for reading; mirrors `safetensors.safe_open`.

    Args:
        filename: the file. It is mapped, not read: only what is asked for is looked at.
        framework: "pt".
        device: where tensors are to be; blobs are moved there and decoded there.
        verify: "full" checks every checksum of what is read, "header" those of headers and index, "off" none. Sizes and offsets
            are always checked: a damaged file gives wrong numbers at worst, under "full" not even those. An ordinary
            file has no checksums.

    Raises:
        CorruptError: a damaged file, or no `.safetensors` file; `tensor` and `block` say where.
        FormatError: a file of a newer major version.
        ValueError: an unknown framework or `verify`.
        OSError, ImportError: no such file; no `safetensors` package.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: str | int | torch.device = "cpu",
        *,
        verify: str = "full",
    ) -> None:
        check_verify(verify)
        if framework not in _FRAMEWORKS:
            raise ValueError(f"framework must be 'pt', got {framework!r}")
        self._path, self._verify = os.fspath(filename), verify
        self._device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        file = container.open_container(self._path)
        self._file: Any = file
        self._identity, self._read = _identity(self._path), 0
        stored = _stored(file)
        self._names = frozenset(stored)
        self._entries = file_index.read(stored, file.metadata(), check=verify != "off")
        if self._entries is None:
            self._refuse_lost_blobs()

    def _refuse_lost_blobs(self) -> None:
        """A tool that rewrote the file without its metadata must not make weights of the bytes of blobs."""
        for name in self._file.keys():
            part = self._file.get_slice(name)
            if name.endswith(SUFFIX) and part.get_dtype() == "U8" and len(part.get_shape()) == 1:
                if bytes(self._file.get_tensor(name)[: len(MAGIC)].numpy()) == MAGIC:
                    raise CorruptError(f"{name!r} is a blob, but the file's fastloss metadata is lost")

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None

    def forget(self, count: int) -> None:
        """Say that `count` bytes of what was read are not needed any more, so that a long run does not gather memory.

        Pages of a mapped file count as the process's own until it is closed: after each 64 MiB it is opened anew. Tensors that
        live on keep their memory. Raises CorruptError where another file has taken this one's place.
        """
        self._read += count
        if self._read < _FORGET:
            return
        self._open()
        self._file, self._read = container.open_container(self._path), 0
        if _identity(self._path) != self._identity:
            raise CorruptError(f"{self._path} was replaced while it was read")

    def _open(self) -> Any:
        if self._file is None:
            raise ValueError(f"{self._path} is closed")
        return self._file

    @property
    def is_compressed(self) -> bool:
        """Whether `save_file` wrote this file; an ordinary one has neither blobs nor checksums."""
        return self._entries is not None

    def keys(self) -> list[str]:
        """The names of the tensors, blobs under the names of what they hold."""
        return list(self._open().keys()) if self._entries is None else list(self._entries)

    def metadata(self) -> dict[str, str] | None:
        """The user's metadata."""
        return file_index.user_metadata(self._open().metadata())

    def entry(self, name: str) -> Entry | None:
        """How a tensor is stored: dtype, shape, codec, checksum; None in an ordinary file.

        Raises KeyError where there is no such tensor.
        """
        self._open()
        if name not in (self._names if self._entries is None else self._entries):
            raise KeyError(f"{self._path} has no tensor {name!r}")
        return None if self._entries is None else self._entries[name]

    def get_tensor(self, name: str) -> Tensor:
        """The tensor, bit for bit as it was saved, in memory of its own (of an ordinary file: what `safetensors` gives)."""
        entry = self.entry(name)
        if entry is None:
            return self._open().get_tensor(name).to(self._device)
        with _named(name):
            if entry.codec == PLAIN:
                return self._plain(entry).to(self._device, copy=True)
            return self._blob(entry).to(self._device).decompress(verify=self._verify)

    def get_compressed(self, name: str) -> CompressedTensor:
        """The tensor as a blob on the device; what is stored plain becomes a RAW one."""
        entry = self.entry(name)
        if entry is None or entry.codec == PLAIN:
            return compress(self.get_tensor(name), "raw")
        with _named(name):
            blob = self._blob(entry)
            if self._verify == "full":
                blob.verify()
            return CompressedTensor(blob.blob.to(self._device, copy=True), blob.header)

    def get_slice(self, name: str) -> TensorSlice:
        """A view that decodes what is asked of it: `f.get_slice(name)[10:20]` touches the blocks of ten rows."""
        entry = self.entry(name)
        if entry is None or entry.codec == PLAIN:
            tensor = self._open().get_tensor(name) if entry is None else self._checked_plain(name, entry)
            return TensorSlice(name, tensor, self._device, self._verify)
        with _named(name):
            return TensorSlice(name, self._blob(entry), self._device, self._verify)

    def get_stored(self, name: str) -> Tensor:
        """The bytes of a tensor as the file holds them (1-D uint8): a blob, or the numbers."""
        entry = self.entry(name)
        return container.raw_bytes(self._open().get_tensor(name if entry is None else entry.stored))

    def _checked_plain(self, name: str, entry: Entry) -> Tensor:
        with _named(name):
            return self._plain(entry)

    def _plain(self, entry: Entry) -> Tensor:
        tensor: Tensor = self._open().get_tensor(entry.stored)
        if self._verify == "full" and checksum.of(container.raw_bytes(tensor)) != entry.crc32c:
            raise CorruptError("the checksum of the numbers is wrong")
        return tensor

    def _blob(self, entry: Entry) -> CompressedTensor:
        """The blob, still in the file's mapping, held against the index."""
        blob: Tensor = self._open().get_tensor(entry.stored)
        if blob.data_ptr() % 8:  # another tool moved it: kernels read its offsets as whole numbers
            blob = blob.clone()
        found = CompressedTensor(blob)
        said = (entry.codec, entry.dtype, entry.shape)
        if (found.codec.name.lower(), found.dtype, tuple(found.shape)) != said:
            raise CorruptError(f"the blob is {found!r}, but the index says {said}")
        if self._verify == "full" and blob_checksum(found) != entry.crc32c:
            raise CorruptError("the checksums of the blob's blocks contradict that of the tensor")
        return found


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of a blob say which tensor it is; a blob that is none was damaged, since the index vouches for it."""
    try:
        yield
    except CorruptError as error:
        raise error.within(name) from None
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from None


def _identity(path: str) -> tuple[int, ...]:
    """What changes when another file takes the place of this one."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size


def _stored(file: Any) -> dict[str, tuple[str, list[int]]]:
    parts = {name: file.get_slice(name) for name in file.keys()}
    return {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
