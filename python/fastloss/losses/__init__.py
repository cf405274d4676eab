"""Losses as functions of `RowStats`: each takes statistics and returns one value a row, in a few lines of PyTorch.

Preference and policy losses take log-probabilities of tokens or of answers instead (`fastloss.token_logp`).
"""

from . import catalogue
from .advantages import asymre_advantage, group_relative, opmd_advantage, rec_advantage
from .aggregation import aggregate, entropy_bonus
from .cross_entropy import cross_entropy
from .kl import kl_corrected_k3, kl_k1, kl_k2, kl_k3, kl_low_var
from .off_policy import cispo, rec, sapo, topr
from .policy import asymre, grpo, gspo, opmd, policy_gradient, ppo_clip
from .preference import dpo, ipo, kto, kto_reference_point, orpo, preference, rpo, sequence_logp, simpo

__all__ = [
    "aggregate",
    "asymre",
    "asymre_advantage",
    "catalogue",
    "cispo",
    "cross_entropy",
    "dpo",
    "entropy_bonus",
    "group_relative",
    "grpo",
    "gspo",
    "ipo",
    "kl_corrected_k3",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_low_var",
    "kto",
    "kto_reference_point",
    "opmd",
    "opmd_advantage",
    "orpo",
    "policy_gradient",
    "ppo_clip",
    "preference",
    "rec",
    "rec_advantage",
    "rpo",
    "sapo",
    "sequence_logp",
    "simpo",
    "topr",
]
