"""Binary and few-class losses on scores that are given: ensembles, co-training, ranking, masked binary cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import can_look
from ..engine import row_stats
from . import catalogue


@catalogue.entry(
    formula="mean_i sg[g_i] m_i, m = y f; g: sorted random slopes of a calibrated convex loss",
    gradient="g_i y_i / N, g non-decreasing in the margin and negative",
    source="EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
)
def ensemble_loss(
    scores: Tensor, labels: Tensor, *, box_cox: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """EnsLoss of scores [N] and labels [N] in {-1, 1}: the slope of a new random loss at every call.

    box_cox: lambda of the inverse Box-Cox transform of the normal draws, uniform on (-1, 1) when None. Its value means
    nothing by itself; its gradient is that of a convex calibrated loss.

    Raises ValueError for shapes that differ and (on a CPU) labels that are neither.
    """
    if scores.shape != labels.shape or scores.dim() != 1:
        raise ValueError(f"takes scores [N] and labels [N], got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if can_look(labels) and (labels.abs() != 1).any():
        raise ValueError(f"labels must be -1 or 1, got {labels[labels.abs() != 1][0].item()}")
    margin = labels.to(scores.dtype) * scores
    with torch.no_grad():
        lam = box_cox
        if lam is None:
            lam = float(2 * torch.rand((), generator=generator) - 1)
        draw = torch.randn(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
        inverse = draw.exp() if abs(lam) < 1e-6 else (lam * draw + 1).clamp(min=1e-12) ** (1 / lam)
        slope = -inverse.clamp(max=1).sort(descending=True).values  # ascending: the smallest margin pulls hardest
        ordered = torch.empty_like(slope).index_copy_(0, margin.argsort(), slope)
        ordered = torch.where(margin > 1, ordered / margin.clamp(min=1), ordered) - 1e-6
    return (ordered.to(scores.dtype) * margin).mean()


@catalogue.entry(
    formula="mean_{max q >= t+} max q (-log p_yhat) + mean_{min q < t-} min q (-log(1 - p_ymin))",
    gradient="weights times -sigma(-d) and sigma(d) of the two margins",
    source="Translation Consistent Semi-supervised Segmentation for 3D Medical Images",
    published="the negative term indexes 1 - yhat (two classes only) and clamps 1 - p at 1e-6; here the margin form",
)
def confident_bilateral(logits: Tensor, other: Tensor, *, positive: float = 0.65, negative: float = 0.1) -> Tensor:
    """CBC of logits [..., C] under the probabilities [..., C] of another view (detached): confident positives and negatives.

    The class the other view believes in is learned where its probability is at least `positive`, and the class it rules
    out is unlearned where its probability is below `negative`.

    One number.
    """
    q = other.detach()
    high, likely = q.max(-1)
    low, unlikely = q.min(-1)

    def mean(rows: Tensor, chosen: Tensor) -> Tensor:
        return torch.where(chosen, rows, 0.0).sum() / chosen.sum().clamp(min=1)

    learn = -row_stats(logits, likely).logp * high
    unlearn = -row_stats(logits, unlikely).log1mp * low
    return mean(learn, high >= positive) + mean(unlearn, low < negative)


@catalogue.entry(
    formula="L + relu(L_d - L) L_d + relu(L_s - L) L_s",
    gradient="by autograd, through the weights too unless detached",
    source="FCN: Fusing Exponential and Linear Cross Network for Click-Through Rate Prediction",
    published="the weights are not detached in the published code, though the paper calls them weights: `detach` chooses",
)
def tri_bce(logits: Tensor, deep: Tensor, shallow: Tensor, target: Tensor, *, detach: bool = False) -> Tensor:
    """Tri-BCE of the fused logits and those of two branches on one binary label; means over all elements."""
    whole, first, second = (F.binary_cross_entropy_with_logits(x, target.to(x.dtype)) for x in (logits, deep, shallow))
    w_first, w_second = torch.relu(first - whole), torch.relu(second - whole)
    if detach:
        w_first, w_second = w_first.detach(), w_second.detach()
    return whole + w_first * first + w_second * second


@catalogue.entry(
    formula="(1/k) sum_{i < j <= k} log10(v_i - v_j + 1) softplus(s_j - s_i), items by falling v",
    gradient="log10(..) (-sigma(s_j - s_i)) on s_i, the opposite on s_j",
    source="Learn to Rank Risky Investors: A Case Study of Predicting Retail Traders' Behaviour and Profitability",
)
def profit_aware_bce(scores: Tensor, profit: Tensor, *, k: int = 3) -> Tensor:
    """PA-BCE of scores [..., n]: the k most profitable items should be ranked as their profits are. One value a list.

    Raises ValueError for shapes that differ and k outside 1..n.
    """
    if scores.shape != profit.shape or not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"takes scores and profits of one shape and 1 <= k <= n, got {tuple(scores.shape)}, k = {k}")
    value, best = profit.topk(k, -1)
    s = scores.gather(-1, best)
    weight = torch.log10((value[..., :, None] - value[..., None, :]).clamp(min=0) + 1).to(s.dtype)
    pairs = F.softplus(s[..., None, :] - s[..., :, None]) * weight
    return pairs.triu(1).sum((-2, -1)) / k


def _check_chosen(name: str, chosen: Tensor, shape: torch.Size) -> None:
    if chosen.dtype != torch.bool or chosen.shape != shape:
        raise ValueError(f"{name} must be torch.bool {tuple(shape)}, got {chosen.dtype} {tuple(chosen.shape)}")


@catalogue.entry(
    formula="(1 / valid rows) sum_i sum_j [valid_i] BCE(z_ij, t_ij), no gradient in the frozen columns",
    gradient="sigma(z_ij) - t_ij on the columns that train",
    source="Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic Segmentation",
)
def masked_bce(logits: Tensor, target: Tensor, *, trained: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Binary cross entropy of logits [..., C], summed over classes, mean over the valid rows [...]; others are not read.

    trained [C] bool: other columns keep their value in the loss and get no gradient. BARM's pseudo-background loss:
    trained = the background's and the new task's channels; its distillation: target = sigmoid(old logits).

    One number. Raises ValueError for shapes that differ and masks that are not bool of the shapes above.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits and target must have one shape, got {tuple(logits.shape)} and {tuple(target.shape)}")
    z, t = logits, target.to(logits.dtype)
    if trained is not None:
        _check_chosen("trained", trained, logits.shape[-1:])
        z = torch.where(trained, z, z.detach())
    if valid is None:
        return F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(-1).mean()
    _check_chosen("valid", valid, logits.shape[:-1])
    z, t = (torch.where(valid[..., None], x, 0.0) for x in (z, t))  # 0 * NaN would be NaN in the gradient
    rows = F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(-1)
    return torch.where(valid, rows, 0.0).sum() / valid.sum().clamp(min=1)


@catalogue.entry(
    formula="mean_{unlabelled} relu((1 - u)^2 - u^2) = mean relu(1 - 2 u), u = sigma(z_bg)",
    gradient="-2 u (1 - u) where u < 1/2",
    source="Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic Segmentation",
    published="squares that cancel; (1 - u)^2 - u^2 is 1 - 2 u",
)
def background_triplet(background: Tensor, unlabelled: Tensor) -> Tensor:
    """BARM's triplet term of the background's logits [...] on the unlabelled pixels [...], bool; others are not read."""
    _check_chosen("unlabelled", unlabelled, background.shape)
    rows = torch.relu(-torch.tanh(torch.where(unlabelled, background, 0.0) / 2))  # 1 - 2 sigma(z), at z = 0 none
    return rows.sum() / unlabelled.sum().clamp(min=1)


@catalogue.entry(
    formula="alignment + gamma CE(degree logits, degree)",
    gradient="the sum of both",
    source="Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
    published="its repository holds a licence only; the form is the paper's",
)
def preference_degree(alignment: Tensor, logits: Tensor, degree: Tensor, *, gamma: float = 0.1) -> Tensor:
    """An alignment loss (DPO and the like) with a classifier [N, K] of how much of a response was kept, labels [N]."""
    return alignment + gamma * -row_stats(logits, degree).logp.mean()
