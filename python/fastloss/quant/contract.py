"""Names of the numbers that the bit ops exchange, as in csrc/bits.h (docs/design.md, "The bit contract")."""

from __future__ import annotations

from enum import IntEnum, IntFlag

#: Rows of bits are padded to this many bytes: one AVX-512 register, two k-steps of a binary tensor core.
ROW_BYTES = 64


class Pack(IntEnum):
    """How `pack_bits` makes bits of numbers."""

    SIGN = 0
    TERNARY = 1
    CODES = 2


class Surrogate(IntEnum):
    """The function whose derivative stands for that of sign."""

    IDENTITY = 0
    CLIP = 1
    APPROX = 2
    RESTE = 3
    BIPER = 4
    SWISH = 5
    FDA = 6


class Save(IntFlag):
    """What `binarize` returns besides, or instead of, the dense result."""

    NOTHING = 0
    DENSE = 1
    SIGNS = 2
    MASK = 4
    CODES = 8


class Grad(IntFlag):
    """Gradients that `binarize_backward` and `fake_quant_backward` have to make."""

    NOTHING = 0
    X = 1
    SCALE = 2
    SHIFT = 4


class Activation(IntEnum):
    """The last step of the epilogue of `bgemm`."""

    NONE = 0
    RELU = 1
    HARDTANH = 2
    SILU = 3


def row_bytes(columns: int) -> int:
    """Bytes of a row of `columns` bits."""
    return -(-columns // (8 * ROW_BYTES)) * ROW_BYTES


class HashGrad(IntFlag):
    """Gradients that `hash_attention_backward` has to make."""

    NOTHING = 0
    Q = 1
    K = 2
    V = 4
