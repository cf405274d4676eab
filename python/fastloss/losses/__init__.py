"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .cross_entropy import cross_entropy
from .region import (
    balanced_accuracy,
    dice,
    f_beta,
    focal_tversky,
    g_mean,
    iou,
    mean_entropy,
    proportion_kl,
    region_bce,
    repri,
    tversky,
)

__all__ = [
    "balanced_accuracy",
    "catalogue",
    "cross_entropy",
    "dice",
    "f_beta",
    "focal_tversky",
    "g_mean",
    "iou",
    "mean_entropy",
    "proportion_kl",
    "region_bce",
    "repri",
    "tversky",
]
