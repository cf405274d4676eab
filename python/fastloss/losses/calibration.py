"""Losses that make confidences honest: of each row (CA, logit margin), or of a whole batch (MMCE, MDCA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, check_not_negative, check_temperature, counted


def _statistics(temperature: float | Tensor | None = None) -> tuple[str, ...]:
    return ("argmax",) if temperature is None else ("argmax", "tempered_lse")


@catalogue.row(
    formula="(c - p_max)^2, c = 1 where argmax = y, else 0",
    gradient="2 (p_max - c) p_max (1[j=argmax] - p_j)",
    source="Optimizing Calibration by Gaining Aware of Prediction Correctness",
    statistics=_statistics,
    temperature="temperature",
    published="no official code; here 1 - p_max of a right row is e^(-softplus(d)), not a difference",
)
def calibration(stats: RowStats, *, temperature: float | Tensor | None = None) -> Tensor:
    """(c - p_max)^2 where c says whether the prediction is right: the correctness-aware loss (CA), 0 on ignored rows.

    p_max = max softmax(z / temperature); temperature: None (1), a number, or one a row, whose gradient is

        dL/dT = 2 (p_max - c) p_max (E_p[z] - z_max) / T^2,   p = softmax(z / T)

    Where the statistics have no gradient of T, a calibrator that is trained divides the logits itself: logits / T[:, None].
    Needs "argmax", and "tempered_lse" with a temperature; `row_loss` asks for both. Raises ValueError for statistics at
    another temperature.

    "Optimizing Calibration by Gaining Aware of Prediction Correctness", Liu, Wang, Xu, Zheng and Gould (2024).
    """
    if temperature is None:
        wrong, largest = stats.log1mp, stats.max_logp
    else:
        check_temperature(stats, "temperature", temperature)
        wrong, largest = F.logsigmoid(-stats.tempered_margin), stats.tempered_max_logp
    return counted(stats, torch.exp(2 * torch.where(stats.accuracy == 1, wrong, largest)))


@catalogue.entry(
    formula="(1/V) sum_j relu(max_k z_k - z_j - margin)",
    gradient="-1/V on every j with z_j < max - margin, and the negative sum of these on argmax",
    source="The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration",
)
def logit_margin(logits: Tensor, *, margin: float = 10.0) -> Tensor:
    """(1/V) sum_j relu(max_k z_k - z_j - margin) of logits [..., V], one value a row; columns of -inf add nothing.

    The penalty of margin-based label smoothing (MbLS): add 0.1 of it to cross entropy. float16 and bfloat16
    are computed in float32. Raises ValueError for margin < 0.

    Liu, Ben Ayed, Galdran and Dolz, "The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration" (2022).
    """
    check_not_negative(margin=margin)
    z = logits if logits.dtype == torch.float64 else logits.float()
    real = z != -torch.inf
    z = torch.where(real, z, 0.0)
    largest = torch.where(real, z, -torch.inf).amax(-1, keepdim=True)
    gap = torch.where(real, torch.where(real, largest, 0.0) - z, 0.0)
    return F.relu(gap - margin).mean(-1)


@catalogue.entry(
    formula="sqrt((1/N^2) sum_{a, b} (c_a - r_a) (c_b - r_b) e^(-|r_a - r_b| / width)), r = p_max, c = 1 where right",
    gradient="of the composition, by PyTorch; 0 at 0",
    source="Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings",
    statistics=("argmax",),
)
def mmce(stats: RowStats, *, width: float = 0.4) -> Tensor:
    """The maximum mean calibration error of a batch, one number; needs "argmax". Rows that are ignored count nothing.

    N^2 numbers for N rows: made for batches, not for all tokens of a language model. Raises ValueError for width <= 0.

    Kumar, Sarawagi and Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings" (2018).
    """
    check_above(0, width=width)
    right = stats.accuracy.reshape(-1) == 1
    r = stats.max_logp.exp().reshape(-1)
    error = counted(stats, torch.where(right, stats.log1mp.exp().reshape(-1), -r).reshape(stats.shape)).reshape(-1)
    kernel = torch.exp(-(r[:, None] - r).abs() / width)
    square = error @ kernel @ error
    some = square > 0
    return torch.where(some, torch.sqrt(torch.where(some, square, 1.0)), 0.0) / stats.valid.sum()


@catalogue.entry(
    formula="(1/V) sum_j |mean_i p_ij - mean_i 1[j = y_i]|",
    gradient="of the composition, by PyTorch",
    source="A Stitch in Time Saves Nine: A Train-Time Regularizing Loss for Improved Neural Network Calibration",
    published="a loop over classes; softmax of a softmax in the cross entropy beside it",
)
def mdca(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """(1/V) sum_j |mean_i p_ij - mean_i 1[j = y_i]| of logits [..., V] and class ids [...]: one number.

    How far the average confidence in each class is from its frequency in the batch. Probabilities are stored: for small V.
    Raises ValueError if the target's shape is not that of the rows.

    Hebbalaguppe, Prakash, Madan and Arora, "A Stitch in Time Saves Nine: A Train-Time Regularizing Loss for Improved Neural
    Network Calibration" (2022).
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target ids must have shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}")
    valid = (target != ignore_index).reshape(-1, 1)
    z = logits.reshape(-1, logits.shape[-1])
    p = torch.softmax(torch.where(valid, z, 0.0), -1, dtype=torch.promote_types(z.dtype, torch.float32))
    ids = torch.where(valid, target.reshape(-1, 1), 0)
    apart = torch.where(valid, p.scatter_add(1, ids, torch.full_like(ids, -1, dtype=p.dtype)), 0.0)
    return (apart.sum(0) / valid.sum()).abs().mean()
