"""Published methods on top of the bit ops, one file a method."""

from __future__ import annotations

from .key_value_bottleneck import KeyValueBottleneck, kmeans
from .recurrent_binarizer import (
    RecurrentBinarizer,
    inverse_norms,
    pack_recurrent,
    recurrent_binarizer_loss,
    symmetric_distance_topk,
)

__all__ = [
    "KeyValueBottleneck",
    "RecurrentBinarizer",
    "inverse_norms",
    "kmeans",
    "pack_recurrent",
    "recurrent_binarizer_loss",
    "symmetric_distance_topk",
]
