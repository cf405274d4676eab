"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .cross_entropy import cross_entropy
from .distillation import (
    binary_distillation,
    forward_kl,
    jensen_shannon,
    knowledge_distillation,
    log_cosh,
    mean_teacher_cross_entropy,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    symmetric_kl,
    teacher_cross_entropy,
    total_variation,
)
from .sparse_distillation import plackett_luce, plackett_luce_order, sparse_forward_kl
from .values import bin_centres, bin_readout, hl_gauss, two_hot, two_hot_columns

__all__ = [
    "bin_centres",
    "bin_readout",
    "binary_distillation",
    "catalogue",
    "cross_entropy",
    "forward_kl",
    "hl_gauss",
    "jensen_shannon",
    "knowledge_distillation",
    "log_cosh",
    "mean_teacher_cross_entropy",
    "plackett_luce",
    "plackett_luce_order",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "sparse_forward_kl",
    "symmetric_kl",
    "teacher_cross_entropy",
    "total_variation",
    "two_hot",
    "two_hot_columns",
]
