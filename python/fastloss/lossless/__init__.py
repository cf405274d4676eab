"""Lossless compression of weights: a checkpoint a third smaller, bit-identical (docs/design.md, "The lossless
contract")."""

from __future__ import annotations

from . import ops  # noqa: F401  (defines the ops)
from .compress import compress, decompress
from .compressed_tensor import CompressedTensor
from .errors import CorruptError, FormatError
from .load_file import load_file
from .safe_open import safe_open
from .save_file import save_file
from .verify_file import verify_file

__all__ = [
    "CompressedTensor", "CorruptError", "FormatError", "compress", "decompress", "load_file", "safe_open", "save_file",
    "verify_file",
]  # fmt: skip
