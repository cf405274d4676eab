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


NUM_STATS, NUM_COEFS, NUM_EPILOGUES = len(Stat), len(Coef), 4


class RegionWant(IntFlag):
    """Statistics of a region that are computed only when asked for, and what its values are."""

    NOTHING = 0
    SQUARES = 1
    CROSS_ENTROPY = 2
    ENTROPY = 4
    SHARP = 8
    PROBABILITIES = 16


class RegionStat(IntEnum):
    """Rows of the `stats` table [10, R] of regions."""

    COUNT = 0
    LABELLED = 1
    TRUE_POSITIVE = 2
    FALSE_POSITIVE = 3
    FALSE_NEGATIVE = 4
    TRUE_NEGATIVE = 5
    SQUARED_ERROR = 6
    LABELLED_SQUARE = 7
    CROSS_ENTROPY = 8
    ENTROPY = 9


class RegionCoef(IntEnum):
    """Rows of the coefficients [5, R] of the gradient's terms."""

    POSITIVE = 0
    NEGATIVE = 1
    SQUARE = 2
    CROSS_ENTROPY = 3
    ENTROPY = 4


NUM_REGION_STATS, NUM_REGION_COEFS = len(RegionStat), len(RegionCoef)
