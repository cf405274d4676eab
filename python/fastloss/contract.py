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
    TEACHER = 32  # this and what follows: row_terms only
    TEACHER_MEAN = 64
    SCORE_MEAN = 128
    TERM = 256
    SUBSET = 512


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


class Term(IntEnum):
    """The separable function whose sum over the columns `row_terms` returns (docs/design.md, "The terms contract")."""

    NONE = 0
    KL = 1
    MIXTURE = 2
    TOTAL_VARIATION = 3
    LOG_COSH = 4
    BCE_LOGITS = 5
    BCE = 6


class TermStat(IntEnum):
    """Rows of the `stats` table [17 + K, N] of `row_terms`; the K listed scores follow."""

    REST_MAX = 0
    REST_LOGSUM = 1
    MAX = 2
    LOGSUM = 3
    MEAN = 4
    SUM = 5
    SUMSQ = 6
    TEACHER_MAX = 7
    TEACHER_LOGSUM = 8
    TEACHER_MEAN = 9
    SCORE_MEAN = 10
    TEACHER_OWN_MEAN = 11
    TERM = 12
    SLOPE = 13
    TEACHER_SLOPE = 14
    SUBSET_MAX = 15
    SUBSET_LOGSUM = 16
    LISTED = 17


class TermCoef(IntEnum):
    """Rows of the coefficients [10 + K, N] of `row_terms_backward`; those of the K listed columns follow."""

    REST = 0
    ALL = 1
    ALL_Z = 2
    ALL_T = 3
    TEACHER = 4
    TERM = 5
    SUBSET = 6
    COLUMN = 7
    LINEAR = 8
    ARG = 9
    LISTED = 10


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
