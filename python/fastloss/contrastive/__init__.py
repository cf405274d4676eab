"""Contrastive and metric-learning losses, as functions of embeddings and as modules; no similarity matrix is stored."""

from .alignment import BilinearInfoNCE, bilinear_info_nce_loss, glocal_alignment_loss, siamlip_loss
from .clip import ClipLoss, clip_loss
from .compatibility import bct_loss, bt2_loss
from .face_margins import AngularMarginLoss, angular_margin_loss, unpg_loss
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
from .koleo import KoLeoLoss, info_nce_koleo_loss, koleo_loss
from .mann_whitney import MWLoss, mw_loss
from .mean_teacher import nearest_prototypes, rmt_loss, view_contrast_loss
from .mixing import MetrixLoss, draw_mixture, metrix_loss, mixup_info_nce_loss
from .pair_margins import ContrastiveLoss, TCMLoss, contrastive_loss, tcm_loss
from .ranking_metrics import operating_point_inconsistency, roc_auc
from .retrieval import ar2_retriever_loss, blockrank_loss
from .siglip import ClipnTerms, SigLipLoss, clipn_loss, clipn_terms, siglip_loss
from .soft_targets import M3CoLLoss, SoftClipLoss, distill_clip_loss, soft_clip_loss, swalip_loss
from .wasserstein import gradient_penalty, wpc_loss

__all__ = [
    "AngularMarginLoss",
    "BarlowTwinsLoss",
    "BilinearInfoNCE",
    "ClipLoss",
    "ClipnTerms",
    "ContrastiveLoss",
    "CyCLIPLoss",
    "KoLeoLoss",
    "M3CoLLoss",
    "MWLoss",
    "MetrixLoss",
    "SigLipLoss",
    "SoftClipLoss",
    "TCMLoss",
    "VICRegLoss",
    "angular_margin_loss",
    "ar2_retriever_loss",
    "barlow_twins_loss",
    "bct_loss",
    "bilinear_info_nce_loss",
    "blockrank_loss",
    "bt2_loss",
    "clip_loss",
    "clipn_loss",
    "clipn_terms",
    "contrastive_loss",
    "cyclip_loss",
    "distill_clip_loss",
    "draw_mixture",
    "glocal_alignment_loss",
    "gor_loss",
    "gradient_penalty",
    "icnn_loss",
    "icnn_score",
    "info_nce_koleo_loss",
    "koleo_loss",
    "metrix_loss",
    "mixup_info_nce_loss",
    "mw_loss",
    "nearest_prototypes",
    "operating_point_inconsistency",
    "pamc_loss",
    "proto_triplet_loss",
    "rmt_loss",
    "roc_auc",
    "siamlip_loss",
    "siglip_loss",
    "soft_clip_loss",
    "spectral_contrastive_loss",
    "swalip_loss",
    "tcm_loss",
    "unpg_loss",
    "vicreg_loss",
    "view_contrast_loss",
    "wpc_loss",
]
