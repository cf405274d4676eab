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


class Pointwise(IntEnum):
    """Losses that are a sum over elements of a function of input and labels."""

    BCE_WITH_LOGITS = 0
    KL_DIV = 1
    KL_DIV_LOG_TARGET = 2


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


class PairWant(IntFlag):
    """Statistics of pairs that are computed only when asked for."""

    NOTHING = 0
    COLUMNS = 1
    MEAN = 2
    SECOND = 4


class PairNeeds(IntFlag):
    """Gradients that a pair op has to make."""

    NOTHING = 0
    Q = 1
    K = 2
    ROW_SCALE = 4
    COLUMN_SCALE = 8


class PairStat(IntEnum):
    """Rows of the tables [9, M] of the rows and [7, N] of the columns of `pair_stats`."""

    NEG_MAX = 0
    NEG_LOGSUM = 1
    POS_MAX = 2
    POS_LOGSUM = 3
    POS_SUM = 4
    NEG_COUNT = 5
    POS_COUNT = 6
    NEG_MEAN = 7
    NEG_SECOND = 8


class PairFunction(IntEnum):
    """phi of `pair_map`."""

    SOFTPLUS = 0
    HINGE = 1
    SQUARED_HINGE = 2
    SIGMOID = 3


class PairMapStat(IntEnum):
    """Rows of the table [8, M] of `pair_map`."""

    NEG = 0
    POS = 1
    NEG_SLOPE = 2
    POS_SLOPE = 3
    NEG_ACTIVE = 4
    POS_ACTIVE = 5
    NEG_COUNT = 6
    POS_COUNT = 7


class PairClasses(IntFlag):
    """Which pairs `row_topk` ranks."""

    NEGATIVE = 1
    POSITIVE = 2
    BOTH = 3


NUM_PAIR_STATS, NUM_PAIR_COLUMN_STATS, NUM_PAIR_MAP_STATS = len(PairStat), int(PairStat.NEG_MEAN), len(PairMapStat)
