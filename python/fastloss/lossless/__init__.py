"""Lossless compression of weights: a checkpoint a third smaller, bit-identical (docs/design.md, "The lossless
contract")."""

from __future__ import annotations

from . import ops  # noqa: F401  (defines the ops)
from .compress import compress, decompress
from .compressed_tensor import CompressedTensor
from .errors import CorruptError, FormatError

__all__ = ["CompressedTensor", "CorruptError", "FormatError", "compress", "decompress"]
