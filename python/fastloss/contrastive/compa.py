"""CompA's modular contrastive loss: several positive texts of an audio, and hard negatives that are its own alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import SameId, pair_stats
from ..pairs.arguments import Temperature
from ..pairs.statistics import logaddexp
from .arguments import check_ids
from .dots import edge_similarity, finite_softplus, segment_lse
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="half the mean over audios of mean_p -log softmax(own and other positives, own negatives)_p, half CE of texts",
    gradient="SupCon-out in rows, CE in columns, one sweep, and the edges to own negatives",
    source="CompA: Addressing the Gap in Compositional Reasoning in Audio-Language Models",
    published="scale trained; the code hides other rows' negatives by a factor -1e5, which shows those with z < 0: left out here",
)
def modular_contrastive_loss(
    audio: Tensor, positives: Tensor, owner: Tensor, scale: Temperature, *, negatives: Tensor | None = None,
    negative_owner: Tensor | None = None, normalize: bool = True, reduction: str = "mean_valid",
) -> Tensor:  # fmt: skip
    """CompA's modular loss. An audio sees the positive texts of all audios and, of the hard negatives, only its own:

        audio:  A_i = log(sum over all positives j of e^(z_ij) + sum over own negatives n of e^(z_in)) - mean of own z_ip
        text:   T_p = log(sum over audios i of e^(z_ip)) - z of p with its owner
        L = (mean A + mean T) / 2

    Args:
        audio: [B, D]. positives: [P, D], texts; owner: integers [P], the row of audio that each belongs to.
        scale: > 0, a number or a trained tensor.
        negatives: [H, D], hard negative texts; negative_owner: integers [H]. None: there are none.
        normalize: similarities are cosines.
        reduction: of audios and of texts: "mean" or "mean_valid" (audios without positives count 0, or not), "sum".

    Raises ValueError, TypeError, and on a CPU IndexError for owners out of range.
    Source: CompA: Addressing the Gap in Compositional Reasoning in Audio-Language Models.
    """
    check_reduction(reduction)
    if reduction == "none":
        raise ValueError("reduction must be mean, mean_valid or sum: audios and texts are not one list")
    if (negatives is None) != (negative_owner is None):
        raise ValueError("negatives and negative_owner come together")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale must be a number or one element, got {list(scale.shape)}")
    b = audio.shape[0]
    check_ids("owner", owner, b, positives.shape[0])
    if negatives is not None and negative_owner is not None:
        check_ids("negative_owner", negative_owner, b, negatives.shape[0])
    rows = torch.arange(b, device=audio.device)
    stats = pair_stats(audio, positives, scale=scale, positive=SameId(rows, owner), normalize=normalize)
    values = stats.nll
    some = stats.has_positive
    if negatives is not None and negative_owner is not None:
        edges = torch.arange(negatives.shape[0], device=audio.device)
        z = scale * edge_similarity(audio, negatives, negative_owner, edges, normalize)
        own = segment_lse(z, negative_owner.long(), b)
        rest = logaddexp(stats.neg_lse, own) - torch.where(some, stats.pos_lse, 0.0)
        values = torch.where(some, finite_softplus(rest), 0.0)
    values = values + torch.where(some, stats.pos_lse, 0.0) - stats.pos_mean
    texts = stats.columns
    return (reduce(values, reduction, some) + reduce(texts.nll, reduction, texts.has_positive)) / 2


class ModularContrastiveLoss(nn.Module):
    """`modular_contrastive_loss` with its trained scale e^log_scale, at most `max_scale`."""

    def __init__(self, init_scale: float = 1 / 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        if not 0 < init_scale <= max_scale:
            raise ValueError(f"init_scale must be in (0, max_scale], got {init_scale} and max_scale={max_scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.max_scale = max_scale

    def forward(
        self, audio: Tensor, positives: Tensor, owner: Tensor, negatives: Tensor | None = None,
        negative_owner: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of audio [B, D] and texts [P, D], [H, D] with their owners."""
        scale = self.log_scale.exp().clamp(max=self.max_scale)
        return modular_contrastive_loss(
            audio, positives, owner, scale, negatives=negatives, negative_owner=negative_owner
        )
