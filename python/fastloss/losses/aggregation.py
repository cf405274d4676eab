"""From one loss a token to one number, and the two clamps that all policy losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Sequences, sequences
from . import catalogue

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum", "none")

#: Log-ratios are clamped here, as verl and Trinity-RFT do: e^20 is finite in every dtype that e^x is taken in.
LOG_RATIO_LIMIT = 20.0


def check_aggregation(mode: str) -> None:
    """Raise ValueError for a mode that is none."""
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}; got {mode!r}")


@catalogue.entry(
    formula="token-mean: sum_bt l / sum_bt m; seq-mean-token-sum: mean_b sum_t l; seq-mean-token-mean: mean_b mean_t l; "
    "seq-sum: sum_b sum_t l",
    gradient="the mask over the denominator",
    source="verl and modelscope/Trinity-RFT trinity/algorithm/utils.py (masked_loss)",
    published="the mask is multiplied with the values there, so that NaN on a masked token stays NaN, and sequences "
    "without tokens enter the mean; here neither",
)
def aggregate(
    tokens: Tensor,
    mask: Tensor | Sequences | None = None,
    aggregation: str = "token-mean",
    *,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One number from one a token [B, T]; 0 where no token counts, never NaN.

    "token-mean": mean over all tokens that count. "seq-mean-token-sum", "seq-mean-token-mean": sum or mean over the
    tokens of a sequence, then mean over the sequences that have any. "seq-sum": the sum of everything. "none": the
    tokens, 0 where they do not count.

    denominator: what to divide by instead of the number of tokens ("token-mean") or of sequences ("seq-mean-..."): that
    of the whole batch when `tokens` is one micro-batch of it, so that the micro-batches' losses add up.

    Raises ValueError for another aggregation, and a denominator where nothing is divided.
    """
    check_aggregation(aggregation)
    s = sequences(mask, tokens)
    kept = s.keep(tokens)
    if aggregation in ("none", "seq-sum"):
        if denominator is not None:
            raise ValueError(f"aggregation {aggregation!r} divides by nothing, got denominator {denominator!r}")
        return kept if aggregation == "none" else kept.sum()
    if aggregation == "token-mean":
        total, count = kept.sum(), s.mask.sum()
    else:
        each = s.sum(kept) if aggregation == "seq-mean-token-sum" else s.mean(kept)
        total, count = each.sum(), (s.sizes(kept) > 0).sum()
    return total / (count.clamp(min=1) if denominator is None else denominator)


@catalogue.entry(
    formula="-weight * aggregate(H)",
    gradient="dH/dz_j = -p_j (z_j - E_p[z])",
    statistics=("entropy",),
    source="Advancing Language Model Reasoning through Reinforcement Learning and Inference Scaling (T1): -alpha H",
    published="alpha is not in the released code: `weight` has no default",
)
def token_entropy_bonus(
    entropy: Tensor, weight: float, *, mask: Tensor | Sequences | None = None, aggregation: str = "token-mean"
) -> Tensor:
    """-weight * aggregate(entropy): add it to a policy loss so that the policy stays random.

    entropy: [B, T] of `token_logp(..., entropy=True)`.
    """
    return -weight * aggregate(entropy, mask, aggregation)


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """logp - old_logp, within +-20, where its exponential and the gradient of it are finite."""
    return torch.clamp(logp - old_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
