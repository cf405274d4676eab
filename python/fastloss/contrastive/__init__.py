"""Contrastive and metric-learning losses, as functions of embeddings and as modules; no similarity matrix is stored."""

from .alignment import BilinearInfoNCE, bilinear_info_nce_loss, glocal_alignment_loss, siamlip_loss
from .amcl import AdaptiveTemperature, AMCLLoss, amcl_loss
from .cacr import CACRLoss, cacr_loss
from .clip import ClipLoss, clip_loss
from .compa import ModularContrastiveLoss, modular_contrastive_loss
from .compatibility import bct_loss, bt2_loss
from .core_tuning import FocalSupConLoss, MixedPairs, focal_supcon_loss, mix_hard_pairs
from .dexml import DecoupledSoftmaxLoss, SoftTopKLoss, decoupled_softmax_loss, soft_topk_loss
from .face_margins import AngularMarginLoss, angular_margin_loss, unpg_loss
from .false_negatives import GuideEmbeddings
from .few_shot import icnn_loss, icnn_score, proto_triplet_loss
from .gram import (
    BarlowTwinsLoss,
    CyCLIPLoss,
    VICRegLoss,
    barlow_twins_loss,
    cyclip_loss,
    gor_loss,
    spectral_contrastive_loss,
    vicreg_loss,
)
from .graph import pamc_loss
from .info_nce import InfoNCELoss, gist_embed_loss, info_nce
from .kalm import FocalInfoNCELoss, focal_info_nce, mix_hard_negatives
from .koleo import KoLeoLoss, info_nce_koleo_loss, koleo_loss
from .mann_whitney import MWLoss, mw_loss
from .mean_teacher import nearest_prototypes, rmt_loss, view_contrast_loss
from .mixing import MetrixLoss, draw_mixture, metrix_loss, mixup_info_nce_loss
from .moco import MoCoLoss, Queue, moco_loss
from .modules import (
    AR2RetrieverLoss,
    BCTLoss,
    BlockRankLoss,
    BT2Loss,
    CLIPNLoss,
    DistillClipLoss,
    GISTEmbedLoss,
    GlocalAlignmentLoss,
    GORLoss,
    HardQuantileLoss,
    ICNNLoss,
    NPairsLoss,
    PamCLoss,
    ProtoTripletLoss,
    RMTLoss,
    SiamLIPLoss,
    SpectralContrastiveLoss,
    SwALIPLoss,
    WPCLoss,
)
from .ntxent import DCLLoss, MACLLoss, NTXentLoss, dcl_loss, macl_loss, ntxent_loss
from .pair_margins import ContrastiveLoss, TCMLoss, contrastive_loss, tcm_loss
from .ranking_metrics import operating_point_inconsistency, roc_auc
from .retrieval import ar2_retriever_loss, blockrank_loss
from .reweighted import (
    DualTemperatureLoss,
    HCLLoss,
    dual_temperature_loss,
    hard_quantile_loss,
    hcl_loss,
    n_pairs_loss,
)
from .siglip import ClipnTerms, SigLipLoss, clipn_loss, clipn_terms, siglip_loss
from .soft_targets import M3CoLLoss, SoftClipLoss, distill_clip_loss, soft_clip_loss, swalip_loss
from .sogclr import ISogCLRLoss, SogCLRLoss
from .supcon import SupConLoss, supcon_loss
from .wasserstein import gradient_penalty, wpc_loss

__all__ = [
    "AMCLLoss",
    "AR2RetrieverLoss",
    "AdaptiveTemperature",
    "AngularMarginLoss",
    "BCTLoss",
    "BT2Loss",
    "BarlowTwinsLoss",
    "BilinearInfoNCE",
    "BlockRankLoss",
    "CACRLoss",
    "CLIPNLoss",
    "ClipLoss",
    "ClipnTerms",
    "ContrastiveLoss",
    "CyCLIPLoss",
    "DCLLoss",
    "DecoupledSoftmaxLoss",
    "DistillClipLoss",
    "DualTemperatureLoss",
    "FocalInfoNCELoss",
    "FocalSupConLoss",
    "GISTEmbedLoss",
    "GORLoss",
    "GlocalAlignmentLoss",
    "GuideEmbeddings",
    "HCLLoss",
    "HardQuantileLoss",
    "ICNNLoss",
    "ISogCLRLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "M3CoLLoss",
    "MACLLoss",
    "MWLoss",
    "MetrixLoss",
    "MixedPairs",
    "MoCoLoss",
    "ModularContrastiveLoss",
    "NPairsLoss",
    "NTXentLoss",
    "PamCLoss",
    "ProtoTripletLoss",
    "Queue",
    "RMTLoss",
    "SiamLIPLoss",
    "SigLipLoss",
    "SoftClipLoss",
    "SoftTopKLoss",
    "SogCLRLoss",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "SwALIPLoss",
    "TCMLoss",
    "VICRegLoss",
    "WPCLoss",
    "amcl_loss",
    "angular_margin_loss",
    "ar2_retriever_loss",
    "barlow_twins_loss",
    "bct_loss",
    "bilinear_info_nce_loss",
    "blockrank_loss",
    "bt2_loss",
    "cacr_loss",
    "clip_loss",
    "clipn_loss",
    "clipn_terms",
    "contrastive_loss",
    "cyclip_loss",
    "dcl_loss",
    "decoupled_softmax_loss",
    "distill_clip_loss",
    "draw_mixture",
    "dual_temperature_loss",
    "focal_info_nce",
    "focal_supcon_loss",
    "gist_embed_loss",
    "glocal_alignment_loss",
    "gor_loss",
    "gradient_penalty",
    "hard_quantile_loss",
    "hcl_loss",
    "icnn_loss",
    "icnn_score",
    "info_nce",
    "info_nce_koleo_loss",
    "koleo_loss",
    "macl_loss",
    "metrix_loss",
    "mix_hard_negatives",
    "mix_hard_pairs",
    "mixup_info_nce_loss",
    "moco_loss",
    "modular_contrastive_loss",
    "mw_loss",
    "n_pairs_loss",
    "nearest_prototypes",
    "ntxent_loss",
    "operating_point_inconsistency",
    "pamc_loss",
    "proto_triplet_loss",
    "rmt_loss",
    "roc_auc",
    "siamlip_loss",
    "siglip_loss",
    "soft_clip_loss",
    "soft_topk_loss",
    "spectral_contrastive_loss",
    "supcon_loss",
    "swalip_loss",
    "tcm_loss",
    "unpg_loss",
    "vicreg_loss",
    "view_contrast_loss",
    "wpc_loss",
]
