"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .cross_entropy import cross_entropy

__all__ = ["catalogue", "cross_entropy"]
