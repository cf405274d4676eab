"""Cross entropy of a student's similarities with a teacher's softmax: neither matrix is stored.

    CE_i = lse_j z_ij - sum_j t_ij z_ij,  z = s <q_i, k_j>,  sum_j t_ij z_ij = s <q_i, sum_j t_ij k_j>

so the target's part is an attention of the teacher's similarities over the student's keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import pair_stats
from ..pairs.arguments import Temperature
from .arguments import check_same_shape, check_scale, unit
from .attention import attention
from .loss_module import LossModule
from .mixing import mixup_info_nce_loss
from .reduction import check_reduction, reduce


def _cross_entropy(
    q: Tensor, k: Tensor, scale: Temperature, row_targets: Tensor, column_targets: Tensor
) -> Tensor:  # fmt: skip
    """(rows + columns) / 2 [B], from each row's mean key and each column's mean query under the teacher."""
    stats = pair_stats(q, k, scale=scale, positive=None)
    rows = stats.neg_lse - scale * (q * row_targets).sum(1)
    columns = stats.columns.neg_lse - scale * (k * column_targets).sum(1)
    return (rows + columns) / 2


@catalogue.entry(
    formula="-(1/2) mean_i sum_j t_ij log softmax_j(z_ij) - (1/2) mean_j sum_i t'_ij log softmax_i(z_ij), t = softmax "
    "over j, t' over i, of the teacher's similarities",
    gradient="(p - t + p' - t') s / 2B to z",
    source="CLIP-KD and open_clip's DistillClipLoss (cross entropy of similarity distributions)",
    published="four B x B matrices; here two attentions. No gradient into the teacher",
)
def distill_clip_loss(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, scale: Temperature, teacher_scale: float | Tensor, *,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The student's similarities of two views follow the teacher's, in both directions.

    Args:
        q, k: the student's embeddings [B, D]; teacher_q, teacher_k: [B, E], no gradient.
        scale, teacher_scale: 1 / temperature of each > 0, a number or a tensor of one element.
        normalize: divide all four by their norms. reduction: "mean", "sum", "none" ([B]).

    Raises ValueError and TypeError as `pair_stats`. Memory: O(B (D + E)) and some megabytes.
    """
    check_reduction(reduction)
    check_same_shape(q, k)
    check_same_shape(teacher_q, teacher_k)
    check_scale("scale", scale)
    check_scale("teacher_scale", teacher_scale)
    if teacher_q.shape[0] != q.shape[0]:
        raise ValueError(f"teacher and student need one batch, got {teacher_q.shape[0]} and {q.shape[0]} rows")
    q, k, tq, tk = (unit(x, normalize) for x in (q, k, teacher_q.detach(), teacher_k.detach()))
    teacher_scale = teacher_scale.detach() if isinstance(teacher_scale, Tensor) else teacher_scale
    row_targets, column_targets = attention(tq, tk, k, teacher_scale), attention(tk, tq, q, teacher_scale)
    return reduce(_cross_entropy(q, k, scale, row_targets, column_targets), reduction)


@catalogue.entry(
    formula="distill_clip_loss whose teacher is the targets' similarity with each other: t = softmax(s k k^T)",
    gradient="(p - t + p' - t) s / 2B to z",
    source="Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification "
    "(SoftCLIP of MindEye)",
    published="three B x B matrices; temperature 0.125. `detach=False` trains the targets' similarities too, as "
    "published",
)
def soft_clip_loss(
    q: Tensor, targets: Tensor, scale: Temperature = 8.0, *, detach: bool = True, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Predictions q against targets whose similarity with one another is the soft label: t = softmax_j(s <k_i, k_j>).

    Args:
        q, targets: [B, D]. scale: s = 1 / temperature > 0, of both softmaxes, a number or a tensor of one element.
        detach: no gradient through the soft labels (through the targets as keys there is one). reduction: as above.

    Raises ValueError and TypeError as `pair_stats`. Memory: O(B D) and some megabytes.
    Source: Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification.
    """
    check_reduction(reduction)
    check_same_shape(q, targets)
    check_scale("scale", scale)
    q, k = unit(q, normalize), unit(targets, normalize)
    teacher = k.detach() if detach else k
    labels_scale = scale.detach() if detach and isinstance(scale, Tensor) else scale
    row_targets, column_targets = (attention(teacher, teacher, x, labels_scale) for x in (k, q))
    return reduce(_cross_entropy(q, k, scale, row_targets, column_targets), reduction)


@torch.no_grad()
def sinkhorn_bias(q: Tensor, k: Tensor, scale: float, iterations: int = 3) -> Tensor:
    """b [N] such that softmax_j(scale <q_i, k_j> + b_j) is the Sinkhorn-Knopp assignment after `iterations`: every column has
    about the same total. Streams the matrix twice an iteration."""
    q, k = unit(q, False), unit(k, False)
    b = k.new_zeros(k.shape[0])
    for step in range(iterations):
        a = q.new_zeros(q.shape[0]) if step == 0 else -_log_row_sums(q, k, scale, b)
        b = -_log_row_sums(k, q, scale, a)
    return b


def _log_row_sums(q: Tensor, k: Tensor, scale: float, bias: Tensor) -> Tensor:
    """lse_j(scale <q_i, k_j> + bias_j), [M]: the bias is one more dimension, in which every q is 1."""
    left, right = torch.cat((scale * q, q.new_ones(q.shape[0], 1)), 1), torch.cat((k, bias[:, None]), 1)
    return pair_stats(left, right, positive=None, columns=False).neg_lse


@catalogue.entry(
    formula="mean over views l, m of -(1/2) mean sum t_ij log softmax_j(s <q^l_i, k^m_j>) and the other direction; t "
    "the Sinkhorn-Knopp assignment of the other views' cosines / 0.05",
    gradient="(p - t) s / B to z; the assignment has none",
    source="Improved baselines for vision-language pre-training",
    published="SwALIP: 3 iterations, epsilon 0.05, weight 0.2 beside the CLIP loss; B x B matrices, exp(cosine / 0.05) "
    "unshifted",
)
def swalip_loss(
    q: Sequence[Tensor], k: Sequence[Tensor], scale: Temperature, *, epsilon: float = 0.05, iterations: int = 3
) -> Tensor:  # fmt: skip
    """SwALIP: the similarities of two augmented images with two augmented texts predict the balanced assignment of the other two.

    Args:
        q, k: two views each, [B, D]; normalised inside. scale: s of the predictions, epsilon: temperature of the
            assignments; > 0, a number or a tensor of one element.

    Returns the mean over the four pairs of views, without the weight 0.2. Raises ValueError and TypeError as `pair_stats`.
    Memory: O(B D) and some megabytes. Source: Improved baselines for vision-language pre-training.
    """
    if len(q) != 2 or len(k) != 2:
        raise ValueError(f"swalip_loss takes two views of each modality, got {len(q)} and {len(k)}")
    check_scale("scale", scale)
    check_scale("epsilon", epsilon)
    for x in (*q, *k):
        check_same_shape(q[0], x)
    images, texts = [unit(x) for x in q], [unit(x) for x in k]
    losses = []
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            tq, tk = images[1 - i].detach(), texts[1 - j].detach()
            rows = attention(tq, tk, text, 1 / epsilon, sinkhorn_bias(tq, tk, 1 / epsilon, iterations))
            columns = attention(tk, tq, image, 1 / epsilon, sinkhorn_bias(tk, tq, 1 / epsilon, iterations))
            losses.append(_cross_entropy(image, text, scale, rows, columns).mean())
    return torch.stack(losses).mean()


class SoftClipLoss(LossModule):
    """`soft_clip_loss` as a module."""

    def __init__(
        self, scale: float = 8.0, *, detach: bool = True, normalize: bool = True, reduction: str = "mean"
    ) -> None:  # fmt: skip
        check_scale("scale", scale)
        super().__init__(soft_clip_loss, scale=scale, detach=detach, normalize=normalize, reduction=reduction)


class M3CoLLoss(nn.Module):
    """M3CoL's contrastive part: `mixup_info_nce_loss` for the first share of the training, then `soft_clip_loss`.

    Source: Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification (a third of
    the epochs, temperatures 0.1 and 0.125; added with a weight of 0.1 to the cross entropies).
    """

    def __init__(self, mixup_share: float = 0.33, mixup_scale: float = 10.0, soft_scale: float = 8.0) -> None:
        super().__init__()
        if not 0 <= mixup_share <= 1:
            raise ValueError(f"mixup_share must be in [0, 1], got {mixup_share}")
        check_scale("mixup_scale", mixup_scale)
        check_scale("soft_scale", soft_scale)
        self.mixup_share, self.mixup_scale, self.soft_scale = mixup_share, mixup_scale, soft_scale

    def mixes(self, progress: float) -> bool:
        """Whether examples are to be mixed when this share of the training is done."""
        return progress < self.mixup_share

    def forward(
        self, q: Tensor, k: Tensor, progress: float, permutation: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor:
        """The mean loss of [B, D]; q of mixed examples, with their permutation and share (`draw_mixture`), while it `mixes`."""
        if not self.mixes(progress):
            return soft_clip_loss(q, k, self.soft_scale)
        if permutation is None or share is None:
            raise ValueError(f"at progress {progress} examples are mixed: pass permutation and share")
        return mixup_info_nce_loss(q, k, permutation, share, self.mixup_scale)
