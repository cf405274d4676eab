"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .cross_entropy import cross_entropy
from .spherical import log_spherical_softmax, log_taylor_softmax, one_hot_mse, z_normalized_loss

__all__ = [
    "catalogue",
    "cross_entropy",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "one_hot_mse",
    "z_normalized_loss",
]
