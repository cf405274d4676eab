"""Fused loss and head kernels for PyTorch: large-vocabulary softmax without the logits, drop-in for torch.nn losses."""

from . import functional, losses, nn
from .device_checks import check_device_targets
from .engine import linear_row_stats, row_stats
from .frechet import frechet_mean, linear_frechet_mean
from .functional import cross_entropy, linear_cross_entropy
from .kept_memory import keep_memory
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .predict import Sampled, TopK, linear_argmax, linear_sample, linear_topk, row_sample
from .registry import BackendError, backends, explain, use_backend
from .row_loss import linear_row_loss, row_loss
from .statistics import RowStats

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "Sampled",
    "TopK",
    "__version__",
    "backends",
    "check_device_targets",
    "cross_entropy",
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
    "nn",
    "row_loss",
    "row_sample",
    "row_stats",
    "use_backend",
]
