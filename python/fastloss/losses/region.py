"""Region losses: functions of `RegionStats` that return one value a region.

With I = sum p t, S = sum p and Y = sum t, every one is written with the false positives S - I and the false negatives
Y - I, which are sums of their own: near a perfect prediction 1 - 2 I / (S + Y) would be a difference of equal numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..region_statistics import RegionStats, ratio
from .catalogue import entry

_SMOOTH = {"linear": 1.0, "plain": 1e-5, "squared": 1e-5}


def _non_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must be >= 0, got {number}")


@entry(
    formula="linear: 1 - (2 I + s) / (S + Y + s); plain: 1 - 2 I / (S + Y + s); squared: 1 - (2 I + s) / (Q + sum t^2 + s)",
    gradient="(a t + b (1 - t)) p (1 - p), a and b of the region's sums; squared: + c (p - t) p (1 - p)",
    statistics=lambda form="linear", **_: ("squared",) if form == "squared" else (),
    source="Milletari, Navab, Ahmadi, V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation; "
    "SeaBird: Segmentation in Bird's View with Dice Loss Improves Monocular 3D Detection of Large Objects; "
    "Translation Consistent Semi-supervised Segmentation for 3D Medical Images",
    published="SeaBird clamps p to [0.001, 0.999], which stops the gradient of confident errors: no clamp here. The plain "
    "form is 1 with gradient 0 in a region without labels, as published: prefer linear.",
)
def dice(stats: RegionStats, *, form: str = "linear", smooth: float | None = None) -> Tensor:
    """Dice loss, one value a region.

    form "linear":  1 - (2 I + s) / (S + Y + s),      s = smooth, 1 by default
    form "plain":   1 - 2 I / (S + Y + s),            s = 1e-5
    form "squared": 1 - (2 I + s) / (Q + sum t^2 + s), s = 1e-5; needs the statistic "squared". With soft labels its
                    minimum is at p = t, that of the others is not.

    A region of zeros only (and smooth 0) has loss 0. Raises ValueError for another form or a negative smooth.
    """
    if form not in _SMOOTH:
        raise ValueError(f"form must be one of {', '.join(_SMOOTH)}, got {form!r}")
    s = _SMOOTH[form] if smooth is None else smooth
    _non_negative(smooth=s)
    if form == "squared":
        return ratio(stats.squared_error, stats.squared_error + 2 * stats.true_positive + s)
    wrong = stats.false_positive + stats.false_negative
    return ratio(wrong + s if form == "plain" else wrong, 2 * stats.true_positive + wrong + s)


@entry(
    formula="1 - (I + e) / (S + Y - I + e)",
    gradient="(a t + b (1 - t)) p (1 - p)",
    source="Boundary-Aware Segmentation Network for Mobile and Web Applications",
    published="No e: 0 / 0 in a region of zeros. Here its loss is 0.",
)
def iou(stats: RegionStats, *, eps: float = 1e-6) -> Tensor:
    """Soft intersection over union: 1 - (I + eps) / (S + Y - I + eps), one value a region; 0 for a region of zeros.

    Raises ValueError for a negative eps.
    """
    _non_negative(eps=eps)
    wrong = stats.false_positive + stats.false_negative
    return ratio(wrong, stats.true_positive + wrong + eps)


def _tversky(stats: RegionStats, alpha: float, beta: float, smooth: float) -> Tensor:
    _non_negative(alpha=alpha, beta=beta, smooth=smooth)
    wrong = alpha * stats.false_positive + beta * stats.false_negative
    return ratio(wrong, stats.true_positive + wrong + smooth)


@entry(
    formula="1 - (I + s) / (I + alpha (S - I) + beta (Y - I) + s)",
    gradient="(a t + b (1 - t)) p (1 - p)",
    source="Salehi, Erdogmus, Gholipour, Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional Deep Networks",
)
def tversky(stats: RegionStats, *, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0) -> Tensor:
    """Tversky loss, one value a region: alpha weighs false positives, beta false negatives; 1/2 and 1/2 is Dice, 1 and 1 IoU.

    Raises ValueError for a negative number.
    """
    return _tversky(stats, alpha, beta, smooth)


@entry(
    formula="(1 - Tversky index)^gamma",
    gradient="gamma (1 - index)^(gamma - 1) times Tversky's",
    source="Abraham, Khan, A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion Segmentation",
    published="The power below 1 has an infinite slope at a loss of 0, NaN after 0 * inf: here the gradient there is 0.",
)
def focal_tversky(
    stats: RegionStats, *, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, smooth: float = 1.0
) -> Tensor:
    """Tversky loss to the power gamma (the paper's 1 / gamma with gamma 4/3), one value a region.

    alpha weighs false positives, beta false negatives (in the paper the letters are the other way round).
    Raises ValueError for a negative number.
    """
    _non_negative(gamma=gamma)
    base = _tversky(stats, alpha, beta, smooth)
    perfect = base == 0
    return torch.where(perfect, 0.0, torch.where(perfect, 1.0, base) ** gamma)


@entry(
    formula="1 - (1 + beta^2) I / (beta^2 Y + S + e), p = sigmoid(L (sigmoid(x) - 1/2))",
    gradient="(a t + b (1 - t)) L p (1 - p) sigmoid(x) (1 - sigmoid(x))",
    source="AnyLoss: Transforming Classification Metrics into Loss Functions",
)
def f_beta(stats: RegionStats, *, beta: float = 1.0, eps: float = 1e-5) -> Tensor:
    """AnyLoss of the F-beta score, one value a region; give `region_stats` a `sharpness` L, 2 to 70 in the paper.

    In a region without labels it is 1 and moves nothing, as published. Raises ValueError for a negative number.
    """
    _non_negative(beta=beta, eps=eps)
    wrong = stats.false_positive + beta**2 * stats.false_negative
    return ratio(wrong + eps, (1 + beta**2) * stats.true_positive + wrong + eps)


def _rates(stats: RegionStats) -> tuple[Tensor, Tensor]:
    """(false negatives / Y, false positives / (N - Y)), 0 where there is no such pixel."""
    return ratio(stats.false_negative, stats.labelled), ratio(stats.false_positive, stats.unlabelled)


@entry(
    formula="1 - TPR * TNR, p = sigmoid(L (sigmoid(x) - 1/2))",
    gradient="(a t + b (1 - t)) L p (1 - p) sigmoid(x) (1 - sigmoid(x))",
    source="AnyLoss: Transforming Classification Metrics into Loss Functions",
    published="0 / 0 where a region has one kind of label only: here the rate of the missing kind is 1.",
)
def g_mean(stats: RegionStats) -> Tensor:
    """AnyLoss of the geometric mean (its square): 1 - recall specificity, one value a region; wants a `sharpness`."""
    missed, alarms = _rates(stats)
    return missed + alarms - missed * alarms


@entry(
    formula="1 - (TPR + TNR) / 2, p = sigmoid(L (sigmoid(x) - 1/2))",
    gradient="(a t + b (1 - t)) L p (1 - p) sigmoid(x) (1 - sigmoid(x))",
    source="AnyLoss: Transforming Classification Metrics into Loss Functions",
    published="0 / 0 where a region has one kind of label only: here the rate of the missing kind is 1.",
)
def balanced_accuracy(stats: RegionStats) -> Tensor:
    """AnyLoss of the balanced accuracy: 1 - (recall + specificity) / 2, one value a region; wants a `sharpness`."""
    missed, alarms = _rates(stats)
    return (missed + alarms) / 2


@entry(
    formula="B / N",
    gradient="(p - t) / N",
    statistics=("bce",),
    source="Boundary-Aware Segmentation Network for Mobile and Web Applications",
)
def region_bce(stats: RegionStats) -> Tensor:
    """Mean binary cross entropy of each region, from the same pass as its Dice or IoU; 0 where no pixel counts."""
    return ratio(stats.bce, stats.count)


@entry(
    formula="H / N",
    gradient="-x p (1 - p) / N",
    statistics=("entropy",),
    source="Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?",
)
def mean_entropy(stats: RegionStats) -> Tensor:
    """Mean binary entropy of each region's predictions; 0 where no pixel counts."""
    return ratio(stats.entropy, stats.count)


@entry(
    formula="r log(r / prior) + (1 - r) log((1 - r) / (1 - prior)), r = S / N",
    gradient="(log(r / prior) - log((1 - r) / (1 - prior))) p (1 - p) / N",
    source="Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?",
)
def proportion_kl(stats: RegionStats, *, prior: float | Tensor) -> Tensor:
    """KL of the mean prediction r = S / N to a prior proportion, one value a region; 0 where no pixel counts.

    prior: a number in (0, 1), or a tensor that broadcasts to the regions. Raises ValueError for a number outside.
    """
    if not isinstance(prior, Tensor):
        if not 0 < prior < 1:
            raise ValueError(f"prior must be in (0, 1), got {prior}")
        prior = stats.count.new_tensor(prior)
    foreground = ratio(stats.predicted, stats.count)
    background = ratio(stats.false_negative + stats.true_negative, stats.count)
    return _relative_entropy(foreground, prior) + _relative_entropy(background, 1 - prior)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q), 0 with gradient 0 at p = 0."""
    none = p == 0
    safe = torch.where(none, 1.0, p)
    return torch.where(none, 0.0, safe * (safe / q).log())


@entry(
    formula="a KL(S / N || prior) + b H / N",
    gradient="the sum of those of proportion_kl and mean_entropy",
    statistics=("entropy",),
    source="Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?",
)
def repri(stats: RegionStats, *, prior: float | Tensor, kl_weight: float = 1.0, entropy_weight: float = 1.0) -> Tensor:
    """The terms of RePRI on a query image, one value a region; the third is the cross entropy of the support images.

    In the paper both weights are 1 / shots, and kl_weight grows by 1 after the tenth of fifty iterations, when the prior
    is set to the proportion predicted by then.
    """
    _non_negative(kl_weight=kl_weight, entropy_weight=entropy_weight)
    return kl_weight * proportion_kl(stats, prior=prior) + entropy_weight * mean_entropy(stats)
