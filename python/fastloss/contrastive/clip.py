"""CLIP: the symmetric cross entropy of two views of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import pair_nll, pair_stats
from ..pairs.arguments import Temperature
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="mean of -log softmax_j(s <q_i, k_j>)_i over rows and over columns, halved",
    gradient="through both directions in one sweep: (p_row + p_column - 2 [i = j]) s / 2B",
    source="Learning Transferable Visual Models From Natural Language Supervision",
    published="s = e^t trained, from 1 / 0.07, at most 100",
)
def clip_loss(
    q: Tensor, k: Tensor, scale: Temperature, *, normalize: bool = False, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The symmetric InfoNCE of CLIP: L_i = (nll_i + nll'_i) / 2, nll_i = lse_j(s <q_i, k_j>) - s <q_i, k_i>, nll' of the columns.

    Args:
        q, k: embeddings [B, D], as they are (open_clip's rule) or divided by their norms (`normalize`).
        scale: s = 1 / temperature > 0, a number or a trained tensor; one a row of q [B] scales z_ij = s_i <q_i, k_j>, in both
            directions.
        label_smoothing: share of the target that is spread over all columns alike, as in cross_entropy.
        reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError as `pair_stats`. Memory: O(B D); the B x B matrix is never stored.
    Source: Learning Transferable Visual Models From Natural Language Supervision.
    """
    check_reduction(reduction)
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, D], got {list(q.shape)} and {list(k.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not label_smoothing:
        rows, columns = pair_nll(q, k, scale=scale, normalize=normalize, columns=True)
    else:
        stats = pair_stats(q, k, scale=scale, normalize=normalize)
        rows, columns = stats.nll, stats.columns.nll
        mean_row, mean_column = mean_logits(q, k, scale, normalize)
        rows = (1 - label_smoothing) * rows + label_smoothing * (stats.lse - mean_row)
        columns = (1 - label_smoothing) * columns + label_smoothing * (stats.columns.lse - mean_column)
    return reduce((rows + columns) / 2, reduction)


def mean_logits(q: Tensor, k: Tensor, scale: Temperature, normalize: bool) -> tuple[Tensor, Tensor]:
    """(mean over j, mean over i) of s_i <q_i, k_j>: <s_i q_i, mean k> and <mean s q, k_j>, which need no matrix."""
    if normalize:
        q, k = nn.functional.normalize(q, dim=1), nn.functional.normalize(k, dim=1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    q = (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale) * q
    return q @ k.mean(0), k @ q.mean(0)


class ClipLoss(nn.Module):
    """`clip_loss` with its trained scale: s = exp(log_scale), clamped to at most `max_scale`.

    Source: Learning Transferable Visual Models From Natural Language Supervision (1 / 0.07 at the start, at most 100).
    """

    def __init__(
        self,
        init_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        normalize: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < init_scale <= max_scale:
            raise ValueError(f"init_scale must be in (0, max_scale], got {init_scale} and max_scale={max_scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.max_scale, self.normalize, self.label_smoothing = max_scale, normalize, label_smoothing

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp().clamp(max=self.max_scale)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """The mean loss of embeddings [B, D]."""
        return clip_loss(q, k, self.scale, normalize=self.normalize, label_smoothing=self.label_smoothing)
