"""Fused loss and head kernels for PyTorch: large-vocabulary softmax without the logits, drop-in for torch.nn losses."""

from . import functional, losses, nn, terms
from .device_checks import check_device_targets
from .distillation_modules import boundary_distillation, multi_aspect_distillation
from .engine import linear_row_stats, row_stats
from .functional import cross_entropy, linear_cross_entropy
from .kept_memory import keep_memory
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .registry import BackendError, backends, explain, use_backend
from .row_loss import linear_row_loss, row_loss
from .statistics import RowStats
from .terms import HLGauss, RowTerm, TeacherHead
from .wide_statistics import WideRowStats

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CrossEntropyLoss",
    "HLGauss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "RowTerm",
    "TeacherHead",
    "WideRowStats",
    "__version__",
    "backends",
    "boundary_distillation",
    "check_device_targets",
    "cross_entropy",
    "explain",
    "functional",
    "keep_memory",
    "linear_cross_entropy",
    "linear_row_loss",
    "linear_row_stats",
    "losses",
    "multi_aspect_distillation",
    "nn",
    "row_loss",
    "row_stats",
    "terms",
    "use_backend",
]
