"""Loss functions as modules, with the published values as defaults; what is given at the call are the tensors.

Each is called as its function is and its options may be replaced at the call: loss(q, k, temperature=t).
"""

from __future__ import annotations

from torch import Tensor, nn

from .alignment import glocal_alignment_loss, siamlip_loss
from .arguments import check_weight
from .compatibility import bct_loss, bt2_loss
from .dots import scale_of
from .few_shot import icnn_loss, proto_triplet_loss
from .gram import gor_loss, spectral_contrastive_loss
from .graph import pamc_loss
from .info_nce import gist_embed_loss
from .loss_module import LossModule
from .mean_teacher import rmt_loss
from .reduction import check_reduction
from .retrieval import ar2_retriever_loss, blockrank_loss
from .reweighted import hard_quantile_loss, n_pairs_loss
from .siglip import clipn_loss
from .soft_targets import distill_clip_loss, swalip_loss
from .wasserstein import Encoder, wpc_loss


class HardQuantileLoss(LossModule):
    """`hard_quantile_loss` as a module: loss(q, k)."""

    def __init__(
        self, temperature: float = 0.07, *, fraction: float = 0.1, normalize: bool = True, reduction: str = "mean"
    ) -> None:
        scale_of(temperature)
        check_reduction(reduction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        super().__init__(
            hard_quantile_loss, temperature=temperature, fraction=fraction, normalize=normalize, reduction=reduction
        )


class NPairsLoss(LossModule):
    """`n_pairs_loss` as a module: loss(anchors, positives)."""

    def __init__(self, *, norm_weight: float = 0.002, reduction: str = "mean") -> None:
        check_weight("norm_weight", norm_weight)
        check_reduction(reduction)
        super().__init__(n_pairs_loss, norm_weight=norm_weight, reduction=reduction)


class GISTEmbedLoss(LossModule):
    """`gist_embed_loss` as a module: loss(q, k, guide), guide a `GuideEmbeddings`, which has the margin."""

    def __init__(
        self, temperature: float = 0.01, *, contrast_anchors: bool = True, contrast_positives: bool = True,
        reduction: str = "mean",
    ) -> None:  # fmt: skip
        scale_of(temperature)
        check_reduction(reduction)
        super().__init__(
            gist_embed_loss, temperature=temperature, contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives, reduction=reduction,
        )  # fmt: skip


class PamCLoss(LossModule):
    """`pamc_loss` as a module: loss(z, rows, columns, weights, clusters, num_clusters)."""

    def __init__(self, *, tau: float = 1.0, eps: float = 1e-10) -> None:
        super().__init__(pamc_loss, tau=tau, eps=eps)


class ProtoTripletLoss(LossModule):
    """`proto_triplet_loss` as a module: loss(queries, labels, prototypes, prototype_labels)."""

    def __init__(self, *, margin: float = 0.5, reduction: str = "mean_valid") -> None:
        check_weight("margin", margin)
        check_reduction(reduction)
        super().__init__(proto_triplet_loss, margin=margin, reduction=reduction)


class ICNNLoss(LossModule):
    """`icnn_loss` as a module: loss(x, labels)."""

    def __init__(self, *, neighbours: int = 4, looked_at: int | None = None) -> None:
        super().__init__(icnn_loss, neighbours=neighbours, looked_at=looked_at)


class GlocalAlignmentLoss(LossModule):
    """`glocal_alignment_loss` as a module: loss(p, z)."""

    def __init__(self, *, scale: float = 1.0, softmax: str = "predictions", detach: bool = True) -> None:
        scale_of(scale, "scale")
        super().__init__(glocal_alignment_loss, scale=scale, softmax=softmax, detach=detach)


class SiamLIPLoss(LossModule):
    """`siamlip_loss` as a module: loss(p_image, v_text, p_text, v_image)."""

    def __init__(self) -> None:
        super().__init__(siamlip_loss)


class BCTLoss(LossModule):
    """`bct_loss` as a module: loss(features, weight, target, old_weight)."""

    def __init__(self, *, compatibility: float = 10.0) -> None:
        check_weight("compatibility", compatibility)
        super().__init__(bct_loss, compatibility=compatibility)


class BT2Loss(LossModule):
    """`bt2_loss` as a module: loss(features, weight, target, old_part, old_weight, old_features, new_part,
    independent_features)."""

    def __init__(self, *, compatibility: float = 10.0, old_cosine: float = 5.0, new_cosine: float = 1.0) -> None:
        weights = {"compatibility": compatibility, "old_cosine": old_cosine, "new_cosine": new_cosine}
        for name, weight in weights.items():
            check_weight(name, weight)
        super().__init__(bt2_loss, **weights)


class RMTLoss(LossModule):
    """`rmt_loss` as a module: loss(logits, augmented_logits, teacher_logits, views)."""

    def __init__(
        self, *, scale: float = 10.0, cross_entropy_weight: float = 1.0, contrast_weight: float = 1.0
    ) -> None:  # fmt: skip
        scale_of(scale, "scale")
        check_weight("cross_entropy_weight", cross_entropy_weight)
        check_weight("contrast_weight", contrast_weight)
        super().__init__(
            rmt_loss, scale=scale, cross_entropy_weight=cross_entropy_weight, contrast_weight=contrast_weight
        )


class BlockRankLoss(LossModule):
    """`blockrank_loss` as a module: loss(attention, relevant) or loss(attention, relevant, valid)."""

    def __init__(self, *, scale: float = 20.0, reduction: str = "mean_valid") -> None:
        scale_of(scale, "scale")
        check_reduction(reduction)
        super().__init__(blockrank_loss, scale=scale, reduction=reduction)


class AR2RetrieverLoss(LossModule):
    """`ar2_retriever_loss` as a module: loss(scores, ranker_scores)."""

    def __init__(
        self, *, adversarial_weight: float = 0.5, temperature: float = 1.0, reduction: str = "mean"
    ) -> None:  # fmt: skip
        scale_of(temperature)
        check_reduction(reduction)
        if not 0 <= adversarial_weight <= 1:
            raise ValueError(f"adversarial_weight must be in [0, 1], got {adversarial_weight}")
        super().__init__(
            ar2_retriever_loss, adversarial_weight=adversarial_weight, temperature=temperature, reduction=reduction
        )


class CLIPNLoss(LossModule):
    """`clipn_loss` as a module: loss(image, text, text_no). A trained scale is given at the call: scale=s."""

    def __init__(self, scale: float, *, normalize: bool = False) -> None:
        scale_of(scale, "scale")
        super().__init__(clipn_loss, scale=scale, normalize=normalize)


class SpectralContrastiveLoss(LossModule):
    """`spectral_contrastive_loss` as a module: loss(q, k)."""

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__(spectral_contrastive_loss, normalize=normalize)


class GORLoss(LossModule):
    """`gor_loss` as a module: loss(q, k)."""

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__(gor_loss, normalize=normalize)


class DistillClipLoss(LossModule):
    """`distill_clip_loss` as a module: loss(q, k, teacher_q, teacher_k). Trained scales are given at the call."""

    def __init__(
        self, scale: float, teacher_scale: float, *, normalize: bool = False, reduction: str = "mean"
    ) -> None:  # fmt: skip
        scale_of(scale, "scale")
        scale_of(teacher_scale, "teacher_scale")
        check_reduction(reduction)
        super().__init__(
            distill_clip_loss, scale=scale, teacher_scale=teacher_scale, normalize=normalize, reduction=reduction
        )


class SwALIPLoss(LossModule):
    """`swalip_loss` as a module: loss((q1, q2), (k1, k2)). A trained scale is given at the call."""

    def __init__(self, scale: float, *, epsilon: float = 0.05, iterations: int = 3) -> None:
        scale_of(scale, "scale")
        scale_of(epsilon, "epsilon")
        super().__init__(swalip_loss, scale=scale, epsilon=epsilon, iterations=iterations)


class WPCLoss(nn.Module):
    """`wpc_loss` with its two encoders: loss(x, y). The weight of the penalty has no published value."""

    def __init__(self, encode_x: Encoder, encode_y: Encoder, *, penalty_weight: float, reduction: str = "mean") -> None:
        super().__init__()
        check_weight("penalty_weight", penalty_weight)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.encode_x, self.encode_y = encode_x, encode_y
        self.penalty_weight, self.reduction = penalty_weight, reduction

    def forward(
        self, x: Tensor, y: Tensor, *, share: Tensor | None = None, permutation: Tensor | None = None
    ) -> Tensor:
        """The loss of inputs [B, ...]."""
        return wpc_loss(
            self.encode_x, self.encode_y, x, y, penalty_weight=self.penalty_weight, share=share,
            permutation=permutation, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options."""
        return f"penalty_weight={self.penalty_weight}, reduction={self.reduction!r}"
