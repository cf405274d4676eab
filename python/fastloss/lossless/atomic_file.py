"""Write a file so that at every moment its name holds the old content, the new content, or nothing: never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: there an open file cannot be removed, which serves as well
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and vanishes when it does not.

    The bytes are on the disk before the name points at them; until then they are under `file.name`. What killed writers of
    the same name left behind is removed.
    """
    target = Path(path)
    _remove_stale(target)
    file = _create(target)
    try:
        with file:
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


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a writer has not finished, or never will."""
    return name.startswith(".") and name.endswith(SUFFIX)


def _create(target: Path) -> BinaryIO:
    """A new file beside `target`, locked as long as its writer lives: the system lets go of it when the process dies."""
    while True:
        file = open(target.parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}", "xb")
        if fcntl is None:
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # or a cleaner had the lock first
            return file
        file.close()


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
        if not (left.name.startswith(f".{target.name}.") and is_temporary(left.name)):
            continue
        with contextlib.suppress(OSError):
            if fcntl is None:
                left.unlink()
                continue
            with open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
                left.unlink()
