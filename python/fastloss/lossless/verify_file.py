"""`verify_file`: every byte of a file against every checksum."""

from __future__ import annotations

import os

from . import checksum, container
from .errors import CorruptError, FormatError
from .file_index import PLAIN
from .safe_open import safe_open


def verify_file(filename: str | os.PathLike[str]) -> None:
    """Raise CorruptError (with the tensor and the block) unless every byte of the file is as `save_file` wrote it.

    Checked: the container (sizes, offsets, no gaps), header and index against their checksum, of every blob its header, the
    checksum of each section, the zeros between them and that of each block of decoded numbers, and every plain tensor. An
    ordinary `.safetensors` file has no checksums: of it the container is checked.
    Raises FormatError, OSError and ImportError as `safe_open` does.
    """
    for error in find_damage(filename):
        raise error


def find_damage(filename: str | os.PathLike[str]) -> list[CorruptError | FormatError]:
    """Everything that `verify_file` would raise, one error a damaged tensor; a damaged header is the only error then."""
    try:
        file = safe_open(filename)
    except (CorruptError, FormatError) as error:
        return [error]
    found: list[CorruptError | FormatError] = []
    with file:
        for name in file.keys():
            entry = file.entry(name)
            if entry is None or entry.same_as is not None:
                continue
            try:
                if entry.codec == PLAIN:
                    if checksum.of(container.raw_bytes(file.get_stored(name))) != entry.crc32c:
                        raise CorruptError("the checksum of the numbers is wrong", name)
                else:
                    file.get_compressed(name)
            except (CorruptError, FormatError) as error:
                found.append(error)
    return found
