"""Pairs as independent yes/no questions: SigLIP's sigmoid loss, and CLIPN's, whose no has a text of its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import pair_map
from ..pairs.arguments import Temperature
from ..pairs.classes import PairSets
from ..pairs.engine import DIAGONAL
from .arguments import check_same_shape, row_dots, wide
from .reduction import check_reduction, reduce


@catalogue.entry(
    formula="(1/B) sum_ij softplus(-y_ij (s <q_i, k_j> + b)), y = 1 for pairs that belong together, else -1",
    gradient="-y_ij sigmoid(-y_ij (s <q_i, k_j> + b)) / B",
    source="Sigmoid Loss for Language Image Pre-Training",
    published="s = e^t from log 10 and b = -10, both trained; the sum is divided by rows, not by pairs",
)
def siglip_loss(
    q: Tensor, k: Tensor, scale: Temperature, bias: float | Tensor, *, positive: PairSets = DIAGONAL,
    excluded: PairSets = None, row_valid: Tensor | None = None, column_valid: Tensor | None = None,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The sigmoid loss of every pair: L_i = sum_j softplus(-y_ij (s <q_i, k_j> + b)).

    Args:
        q: [M, D]; k: [N, D], as they are (open_clip's rule) or divided by their norms (`normalize`).
        scale: s > 0, a number or a trained tensor; bias: b, a number or a trained tensor [].
        positive, excluded, row_valid, column_valid: as in `pair_stats`. positive=None: all pairs are negative, as for the
            texts of another rank.
        reduction: "mean" over rows (the published one: a batch twice as large has a loss about twice as large), "sum", or
            "none" ([M]).

    Raises ValueError and TypeError as `pair_stats`. Memory: O(M + N); the M x N matrix is never stored.
    Source: Sigmoid Loss for Language Image Pre-Training.
    """
    check_reduction(reduction)
    if isinstance(bias, Tensor) and bias.shape not in ((), (1,)):
        raise ValueError(f"bias must be one number, a float or a tensor [], got shape {list(bias.shape)}")
    bias = bias.reshape(()) if isinstance(bias, Tensor) else bias
    pairs = pair_map(
        q, k, "softplus", neg_threshold=-bias, pos_threshold=-bias, scale=scale, positive=positive, excluded=excluded,
        row_valid=row_valid, column_valid=column_valid, normalize=normalize,
    )  # fmt: skip
    return reduce(pairs.neg + pairs.pos, reduction, None if row_valid is None else row_valid.bool())


class SigLipLoss(nn.Module):
    """`siglip_loss` with its trained scale s = exp(log_scale) and bias.

    Source: Sigmoid Loss for Language Image Pre-Training (s = 10 and b = -10 at the start).
    """

    def __init__(self, init_scale: float = 10.0, init_bias: float = -10.0, normalize: bool = True) -> None:
        super().__init__()
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be finite and > 0, got {init_scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.bias = nn.Parameter(torch.tensor(float(init_bias)))
        self.normalize = normalize

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp()

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """The mean loss of embeddings [B, D]."""
        check_same_shape(q, k)
        return siglip_loss(q, k, self.scale, self.bias, normalize=self.normalize)


class ClipnTerms(NamedTuple):
    """The three parts of `clipn_loss`, numbers."""

    yes: Tensor  # of the pairs that belong together
    no: Tensor  # of those that do not
    opposite: Tensor  # of each text and its no


def clipn_terms(
    image: Tensor, text: Tensor, text_no: Tensor, scale: Temperature, *, normalize: bool = False
) -> ClipnTerms:
    """The parts of `clipn_loss`, which see."""
    check_same_shape(image, text)
    check_same_shape(text, text_no)
    if normalize:
        text, text_no = (nn.functional.normalize(wide(t), dim=1) for t in (text, text_no))
    difference = wide(text) - wide(text_no)  # the softmax of two is the sigmoid of their difference
    image = nn.functional.normalize(wide(image), dim=1) if normalize else wide(image)
    pairs = pair_map(image, difference, "softplus", scale=scale)
    batch = image.shape[0]
    distance = 2 - 2 * row_dots(text, text_no) + 1e-4
    return ClipnTerms(
        pairs.pos.sum() / max(batch, 1),
        pairs.neg.sum() / max(batch * batch - batch, 1),
        (2 - distance.sqrt()).mean(),
    )


@catalogue.entry(
    formula="(1/2) (L_yes + L_no + L_tso), p_ij = softmax(s <x_i, t_j>, s <x_i, t'_j>): L_yes = -mean_i log p_ii(yes), "
    "L_no = -mean over i != j of log p_ij(no), L_tso = mean (2 - sqrt(2 - 2 <t, t'> + 1e-4))",
    gradient="that of the sigmoid loss with keys t - t', and the distance's",
    source="CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No",
    published="two B x B matrices and log(softmax), which is -inf where a probability underflows; here softplus of the "
    "difference",
)
def clipn_loss(
    image: Tensor, text: Tensor, text_no: Tensor, scale: Temperature, *, normalize: bool = False
) -> Tensor:  # fmt: skip
    """CLIPN: each image says yes to its own text's `text` and no, by `text_no`, to those of the others.

    Args:
        image, text, text_no: [B, D], of unit norm, or `normalize`.
        scale: s > 0, a number or a trained tensor.

    Returns half the sum of the three terms (`clipn_terms` has them one by one). Raises ValueError and TypeError as
    `pair_map`. Memory: O(B D). Source: CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No.
    """
    return 0.5 * torch.stack(clipn_terms(image, text, text_no, scale, normalize=normalize)).sum()
