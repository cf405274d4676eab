"""Names of the numbers that kernels exchange, as in csrc/fastloss.h; docs/design.md says what each one is."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Want(IntFlag):
    """Statistics that are computed only when asked for."""

    NOTHING = 0
    ENTROPY = 1
    SUM = 2
    SUMSQ = 4
    TEMPERED = 8
    ARGMAX = 16


class Needs(IntFlag):
    """Gradients that a linear op has to make."""

    NOTHING = 0
    INPUT = 1
    WEIGHT = 2
    BIAS = 4


class Stat(IntEnum):
    """Rows of the `stats` table [8, N]."""

    MAX = 0
    LOGSUM = 1
    TARGET = 2
    MEAN = 3
    SUM = 4
    SUMSQ = 5
    LOGSUM_T = 6
    MASS = 7


class Coef(IntEnum):
    """Rows of the coefficients [7, N] of the gradient's terms."""

    OWN = 0
    REST = 1
    REST_Z = 2
    COLUMN = 3
    LINEAR = 4
    REST_T = 5
    ARG = 6


class Pointwise(IntEnum):
    """Losses that are a sum over elements of a function of input and labels."""

    BCE_WITH_LOGITS = 0
    KL_DIV = 1
    KL_DIV_LOG_TARGET = 2


NUM_STATS, NUM_COEFS, NUM_EPILOGUES = len(Stat), len(Coef), 4
