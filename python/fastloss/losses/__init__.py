"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .cross_entropy import cross_entropy
from .electra import electra_replace, replaced_token_detection

__all__ = ["catalogue", "cross_entropy", "electra_replace", "replaced_token_detection"]
