"""Contrastive and metric-learning losses, as functions of embeddings and as modules; no similarity matrix is stored."""

from .amcl import AdaptiveTemperature, AMCLLoss, amcl_loss
from .cacr import CACRLoss, cacr_loss
from .clip import ClipLoss, clip_loss
from .compa import ModularContrastiveLoss, modular_contrastive_loss
from .core_tuning import FocalSupConLoss, MixedPairs, focal_supcon_loss, mix_hard_pairs
from .dexml import DecoupledSoftmaxLoss, SoftTopKLoss, decoupled_softmax_loss, soft_topk_loss
from .false_negatives import GuideEmbeddings
from .info_nce import InfoNCELoss, gist_embed_loss, info_nce
from .kalm import FocalInfoNCELoss, focal_info_nce, mix_hard_negatives
from .moco import MoCoLoss, Queue, moco_loss
from .ntxent import DCLLoss, MACLLoss, NTXentLoss, dcl_loss, macl_loss, ntxent_loss
from .reweighted import (
    DualTemperatureLoss,
    HCLLoss,
    dual_temperature_loss,
    hard_quantile_loss,
    hcl_loss,
    n_pairs_loss,
)
from .sogclr import ISogCLRLoss, SogCLRLoss
from .supcon import SupConLoss, supcon_loss

__all__ = [
    "AMCLLoss",
    "AdaptiveTemperature",
    "CACRLoss",
    "ClipLoss",
    "DCLLoss",
    "DecoupledSoftmaxLoss",
    "DualTemperatureLoss",
    "FocalInfoNCELoss",
    "FocalSupConLoss",
    "GuideEmbeddings",
    "HCLLoss",
    "ISogCLRLoss",
    "InfoNCELoss",
    "MACLLoss",
    "MixedPairs",
    "MoCoLoss",
    "ModularContrastiveLoss",
    "NTXentLoss",
    "Queue",
    "SoftTopKLoss",
    "SogCLRLoss",
    "SupConLoss",
    "amcl_loss",
    "cacr_loss",
    "clip_loss",
    "dcl_loss",
    "decoupled_softmax_loss",
    "dual_temperature_loss",
    "focal_info_nce",
    "focal_supcon_loss",
    "gist_embed_loss",
    "hard_quantile_loss",
    "hcl_loss",
    "info_nce",
    "macl_loss",
    "mix_hard_negatives",
    "mix_hard_pairs",
    "moco_loss",
    "modular_contrastive_loss",
    "n_pairs_loss",
    "ntxent_loss",
    "soft_topk_loss",
    "supcon_loss",
]
