"""The pairs engine: statistics of the similarities of q and k, in a matrix that is never stored."""

from .classes import Diagonal, Guide, PairMask, SameId
from .edges import edge_dot, edge_dot_csr
from .engine import PairHistogram, PairMap, TopPairs, pair_histogram, pair_map, pair_nll, pair_stats, row_topk
from .statistics import PairStats

__all__ = [
    "Diagonal",
    "Guide",
    "PairHistogram",
    "PairMap",
    "PairMask",
    "PairStats",
    "SameId",
    "TopPairs",
    "edge_dot",
    "edge_dot_csr",
    "pair_histogram",
    "pair_map",
    "pair_nll",
    "pair_stats",
    "row_topk",
]
