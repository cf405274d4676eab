"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch."""

from . import catalogue
from .calibration import calibration, logit_margin, mdca, mmce
from .comp_sum import (
    comp_sum,
    generalized_cross_entropy,
    logistic,
    mean_absolute_error,
    smooth_adversarial_comp_sum,
    sum_exponential,
    truncated_generalized_cross_entropy,
)
from .cross_entropy import cross_entropy
from .entropy import brier, confidence_penalty, entropy_bonus, lse_penalty, max_entropy, tsallis_entropy
from .focal import adaptive_focal, focal, unlikelihood
from .ldr import AdaptiveLambda, aldr_kl, l1_normalize, ldr_kl, softplus_normalize
from .pass_at_n import pass_at_n, pass_at_n_sequence, pass_at_n_step
from .rank_mixup import mixup_ndcg, mixup_ranking
from .robust import (
    asymmetric_generalized,
    asymmetric_unhinged,
    normalized_cross_entropy,
    symmetric_cross_entropy,
)
from .router import dynmole_entropy, dynmole_load_balance, dynmole_routing, load_balance, router_z_loss

__all__ = [
    "AdaptiveLambda",
    "adaptive_focal",
    "aldr_kl",
    "asymmetric_generalized",
    "asymmetric_unhinged",
    "brier",
    "calibration",
    "catalogue",
    "comp_sum",
    "confidence_penalty",
    "cross_entropy",
    "dynmole_entropy",
    "dynmole_load_balance",
    "dynmole_routing",
    "entropy_bonus",
    "focal",
    "generalized_cross_entropy",
    "l1_normalize",
    "ldr_kl",
    "load_balance",
    "logistic",
    "logit_margin",
    "lse_penalty",
    "max_entropy",
    "mdca",
    "mean_absolute_error",
    "mixup_ndcg",
    "mixup_ranking",
    "mmce",
    "normalized_cross_entropy",
    "pass_at_n",
    "pass_at_n_sequence",
    "pass_at_n_step",
    "router_z_loss",
    "smooth_adversarial_comp_sum",
    "softplus_normalize",
    "sum_exponential",
    "symmetric_cross_entropy",
    "truncated_generalized_cross_entropy",
    "tsallis_entropy",
    "unlikelihood",
]
