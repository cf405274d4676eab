"""Fused loss and head kernels for PyTorch: large-vocabulary softmax without the logits, drop-in for torch.nn losses;
contrastive losses without the similarities; one-bit and low-bit training and inference."""

from . import contrastive, functional, losses, lossless, nn, quant, terms
from .device_checks import check_device_targets
from .distillation_modules import boundary_distillation, multi_aspect_distillation
from .engine import linear_row_stats, row_stats
from .frechet import frechet_mean, linear_frechet_mean
from .functional import cross_entropy, linear_cross_entropy
from .kept_memory import keep_memory
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .pairs import (
    Diagonal,
    Guide,
    PairMask,
    PairStats,
    SameId,
    edge_dot,
    edge_dot_csr,
    pair_histogram,
    pair_map,
    pair_nll,
    pair_stats,
    row_topk,
)
from .predict import Sampled, TopK, linear_argmax, linear_sample, linear_topk, row_sample
from .region_statistics import RegionStats
from .regions import region_loss, region_stats
from .registry import BackendError, backends, explain, use_backend
from .row_loss import linear_row_loss, row_loss
from .segments import Sequences, segment_mean, segment_sum, segments_of_cu_seqlens
from .statistics import RowStats
from .terms import HLGauss, RowTerm, TeacherHead
from .token_logp import token_logp, token_logp_of_logits, token_mask
from .wide_statistics import WideRowStats

__version__ = "0.5.0"

__all__ = [
    "BackendError",
    "CrossEntropyLoss",
    "Diagonal",
    "Guide",
    "HLGauss",
    "LinearCrossEntropyLoss",
    "PairMask",
    "PairStats",
    "RegionStats",
    "RowStats",
    "RowTerm",
    "SameId",
    "Sampled",
    "Sequences",
    "TeacherHead",
    "TopK",
    "WideRowStats",
    "__version__",
    "backends",
    "boundary_distillation",
    "check_device_targets",
    "contrastive",
    "cross_entropy",
    "edge_dot",
    "edge_dot_csr",
    "explain",
    "frechet_mean",
    "functional",
    "keep_memory",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_frechet_mean",
    "linear_row_loss",
    "linear_row_stats",
    "linear_sample",
    "linear_topk",
    "losses",
    "lossless",
    "multi_aspect_distillation",
    "nn",
    "pair_histogram",
    "pair_map",
    "pair_nll",
    "pair_stats",
    "quant",
    "region_loss",
    "region_stats",
    "row_loss",
    "row_sample",
    "row_stats",
    "row_topk",
    "segment_mean",
    "segment_sum",
    "segments_of_cu_seqlens",
    "terms",
    "token_logp",
    "token_logp_of_logits",
    "token_mask",
    "use_backend",
]
