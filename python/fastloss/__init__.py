"""Fused loss and head kernels for PyTorch: large-vocabulary softmax without the logits, drop-in for torch.nn losses."""

from . import functional, losses, nn
from .device_checks import check_device_targets
from .engine import linear_row_stats, row_stats
from .functional import cross_entropy, linear_cross_entropy
from .kept_memory import keep_memory
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .registry import BackendError, backends, explain, use_backend
from .row_loss import linear_row_loss, row_loss
from .statistics import RowStats

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "__version__",
    "backends",
    "check_device_targets",
    "cross_entropy",
    "explain",
    "functional",
    "keep_memory",
    "linear_cross_entropy",
    "linear_row_loss",
    "linear_row_stats",
    "losses",
    "nn",
    "row_loss",
    "row_stats",
    "use_backend",
]
