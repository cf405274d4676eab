"""Write a file so that at every moment its name holds the old content, the new content, or nothing: never half of it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: there an open file cannot be removed, which serves as well
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"
_LONGEST_NAME = 200


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and vanishes when it does not.

    The bytes are on the disk before the name points at them; until then they are under `file.name`. What killed writers of
    the same name left behind is removed. Of a symbolic link it is the file that is replaced. OSErrors name the file.
    """
    target = _target(path)
    _remove_stale(target)
    file = _create(target)
    try:
        with _named(path), file:
            yield file
            file.flush()
            if hasattr(os, "fchmod") and target.exists():
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
            os.fsync(file.fileno())
            if fcntl is not None:  # while the lock is held, or a cleaner could take it away
                os.replace(file.name, target)
        if fcntl is None:  # open files get no new name there
            os.replace(file.name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write and read in the folder of `path`, gone when the block ends, or with the process, however that ends.

    Where the system can do so it has no name at all. OSErrors name `path`.
    """
    target = _target(path)
    with _named(path), tempfile.TemporaryFile(dir=target.parent, prefix=_beginning(target), suffix=SUFFIX) as file:
        yield file


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that `path` leads to, in a folder that exists."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", os.fspath(target.parent))
    return target


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None:  # a full disk
            error.filename = os.fspath(path)
        raise


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a writer has not finished, or never will."""
    return name.startswith(".") and name.endswith(SUFFIX)


def _create(target: Path) -> BinaryIO:
    """A new file beside `target`, locked as long as its writer lives: the system lets go of it when the process dies."""
    while True:
        file = open(target.parent / f"{_beginning(target)}{secrets.token_hex(4)}{SUFFIX}", "xb")
        if fcntl is None:
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # or a cleaner had the lock first
            return file
        file.close()


def _beginning(target: Path) -> str:
    """How the names of unfinished files of `target` begin: of a long name a part and a checksum, since 255 bytes are the most."""
    name = target.name.encode(errors="surrogateescape")
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 9] + f".{zlib.crc32(name):08x}".encode()
    return f".{name.decode(errors='surrogateescape')}."


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(target: Path) -> None:
    for left in target.parent.iterdir():
        if not (left.name.startswith(_beginning(target)) and is_temporary(left.name)):
            continue
        with contextlib.suppress(OSError):
            if fcntl is None:
                left.unlink()
                continue
            with open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
                left.unlink()
