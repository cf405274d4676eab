"""InfoNCE as retrieval models train it: hard negatives, four directions, hardness, false negatives masked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs.arguments import Temperature
from .candidates import Candidates, together
from .dots import check_pair, finite_softplus, own_similarity, scale_of
from .false_negatives import GuideEmbeddings, limits
from .loss_module import LossModule
from .reduction import check_reduction, reduce

DIRECTIONS = ("q_to_k", "k_to_q", "q_to_q", "k_to_k")
#: The published strength of each hardness mode; nobody has published one for "all".
HARDNESS: dict[str, float | None] = {"in_batch": 9.0, "hard": 5.0, "all": None}


def _check_directions(directions: Sequence[str], partition: str) -> None:
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"directions must be among {', '.join(DIRECTIONS)}, got {direction!r}")
    if "q_to_k" not in directions or len(set(directions)) < len(directions):
        raise ValueError(f"directions must hold q_to_k, where the positive is, and each once; got {tuple(directions)}")
    if partition not in ("joint", "per_direction"):
        raise ValueError(f"partition must be joint or per_direction, got {partition!r}")
    if partition == "per_direction" and {"q_to_q", "k_to_k"} & set(directions):
        raise ValueError("q_to_q and k_to_k have no positive of their own: they need partition='joint'")


def _strengths(mode: str | None, strength: float | None) -> tuple[float, float]:
    """(of in-batch negatives, of hard negatives)"""
    if mode is None:
        if strength is not None:
            raise ValueError("hardness needs a hardness_mode")
        return 0.0, 0.0
    if mode not in HARDNESS:
        raise ValueError(f"hardness_mode must be one of {', '.join(HARDNESS)} or None, got {mode!r}")
    alpha = HARDNESS[mode] if strength is None else strength
    if alpha is None:
        raise ValueError(f"hardness_mode={mode!r} has no published strength: pass hardness")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"hardness must be finite and >= 0, got {alpha}")
    return (alpha if mode != "hard" else 0.0), (alpha if mode != "in_batch" else 0.0)


def _check_candidates(c: Candidates) -> None:
    b, d = c.q.shape
    if c.negatives is not None and (c.negatives.dim() != 3 or c.negatives.shape[0] != b or c.negatives.shape[2] != d):
        raise ValueError(f"negatives must be [{b}, M, {d}], got {list(c.negatives.shape)}")
    if c.shared is not None and (c.shared.dim() != 2 or c.shared.shape[1] != d):
        raise ValueError(f"shared must be [N, {d}], got {list(c.shared.shape)}")
    if isinstance(c.scale, Tensor) and c.scale.numel() != 1 and c.scale.shape != (b,):
        raise ValueError(f"scale must be a number, or a tensor [] or [{b}]; got {list(c.scale.shape)}")
    shapes = (
        ("query_ids", c.query_ids, (b,)),
        ("document_ids", c.document_ids, (b,)),
        ("negative_ids", c.negative_ids, None if c.negatives is None else c.negatives.shape[:2]),
        ("shared_ids", c.shared_ids, None if c.shared is None else c.shared.shape[:1]),
        ("shared_valid", c.shared_valid, None if c.shared is None else c.shared.shape[:1]),
    )
    for name, ids, shape in shapes:
        if ids is None:
            continue
        if shape is None:
            raise ValueError(f"{name} was given, but not the candidates that it describes")
        if ids.shape != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}")
    guide = c.limits.guide
    if guide is not None:
        for name, told, given in (("negatives", guide.negatives, c.negatives), ("shared", guide.shared, c.shared)):
            shape = None if given is None else (*given.shape[:-1], guide.q.shape[1])
            if told is not None and shape is not None and told.shape != shape:
                raise ValueError(f"the guide's {name} must have shape {list(shape)}, got {list(told.shape)}")
    if c.document_ids is None and (c.negative_ids is not None or c.shared_ids is not None):
        raise ValueError("negative_ids and shared_ids are compared with document_ids: pass those too")


def _nll(negative: Tensor, positive: Tensor, times: int) -> Tensor:
    """log(times e^positive + e^negative) - positive, in which nothing cancels."""
    return math.log(times) + finite_softplus(negative - positive - math.log(times))


def focal_weighted(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma (-log p), the gradient through both; 0 with zero gradient where p = 1."""
    if not gamma:
        return nll
    some = nll > 0
    safe = torch.where(some, nll, 1.0)
    return torch.where(some, (-torch.expm1(-safe)) ** gamma * safe, nll * 0.0)


def _smoothed(nll: Tensor, positive: Tensor, means: list[tuple[Tensor, int]], smoothing: float) -> Tensor:
    total = sum(mean * count for mean, count in means) / sum(count for _, count in means)
    return (1 - smoothing) * nll + smoothing * (nll + positive - total)


@catalogue.entry(
    formula="mean of -log e^(s s_ii) / Z_i, Z_i the sum over the candidates of row i in the chosen directions",
    gradient="s (softmax - positive) in each direction, none through masks and hardness",
    source="Representation Learning with Contrastive Predictive Coding",
    published="s 20, cosines; hardness 9 (in-batch), 5 (hard negatives)",
)
def info_nce(
    q: Tensor, k: Tensor, scale: Temperature = 20.0, *, negatives: Tensor | None = None, share_negatives: bool = True,
    shared: Tensor | None = None, shared_valid: Tensor | None = None, directions: Sequence[str] = ("q_to_k",),
    partition: str = "joint", hardness_mode: str | None = None, hardness: float | None = None,
    query_ids: Tensor | None = None, document_ids: Tensor | None = None, negative_ids: Tensor | None = None,
    shared_ids: Tensor | None = None, own_margin: float | None = None, guide: GuideEmbeddings | None = None,
    keys_meet_negatives: bool = True, label_smoothing: float = 0.0, focal_gamma: float = 0.0, normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE: row i of q belongs to row i of k, everything else is a negative.

        joint:          L_i = log(sum over the directions of Z_i) - s s_ii
        per_direction:  L_i = the mean over the directions of log Z_i - s s_ii
        q_to_k: Z_i = sum_j e^(s <q_i, k_j>), with the hard and shared negatives;   k_to_q: sum_j e^(s <k_i, q_j>)
        q_to_q: sum_(j != i) e^(s <q_i, q_j>);   k_to_k: sum_(j != i) e^(s <k_i, k_j>), with the hard negatives of others

    All four, joint, is GTE's loss; q_to_k and k_to_q per direction is the symmetric one.

    Args:
        q, k: [B, D]. scale: s = 1 / temperature > 0, a number, a trained tensor, or one a row [B].
        negatives: [B, M, D], hard negatives of each row; with `share_negatives` also negatives of all other rows.
        shared: [N, D], further negatives of all (a queue); shared_valid: bool [N].
        directions, partition: see above. keys_meet_negatives: whether k_to_k holds shared hard negatives.
        hardness_mode: "in_batch" adds hardness * s_ij (a cosine, without gradient) to the logits of negatives in q_to_k but
            the row's own hard ones, "hard" to these only, "all" to both. hardness: None for the published 9 and 5.
        query_ids, document_ids [B], negative_ids [B, M], shared_ids [N]: what has the row's query, or the document of its
            positive, is no negative of it. (Hard negatives of another row with the same query neither.)
        own_margin: a negative is masked where its similarity exceeds s_ii + own_margin (Qwen3-Embedding: 0.1), by more than
            rounding: an exact copy of the positive is kept, by a guide too.
        guide: masks by a guide's similarity, `GuideEmbeddings` (GISTEmbed).
        label_smoothing: share of the target spread over all candidates; with q_to_k and k_to_q alone, nothing masked.
        focal_gamma: multiplies by (1 - p_i)^gamma, p_i = e^(-L_i), gradient through both.
        normalize: similarities are cosines, of the guide too. reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError for shapes, ids, options and temperatures that do not fit. Memory: O((B + B M + N) D).
    Sources: Representation Learning with Contrastive Predictive Coding; Towards General Text Embeddings with Multi-stage
    Contrastive Learning (directions); LLaVE, EmbeddingGemma (hardness).
    """
    check_reduction(reduction)
    check_pair(q, k)
    if not q.shape[0]:
        raise ValueError("q and k have no rows")
    _check_directions(directions, partition)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not focal_gamma >= 0:
        raise ValueError(f"focal_gamma must be >= 0, got {focal_gamma}")
    in_batch, hard = _strengths(hardness_mode, hardness)
    similarity = own_similarity(q, k, normalize)
    c = Candidates(
        q, k, scale, normalize, limits(q, k, similarity, own_margin, guide, normalize), negatives, share_negatives, shared,
        shared_valid, query_ids, document_ids, negative_ids, shared_ids, in_batch, hard,
    )  # fmt: skip
    _check_candidates(c)
    masked = not c.plain or hard or any(x is not None for x in (query_ids, document_ids, shared_valid))
    if label_smoothing and (masked or {"q_to_q", "k_to_k"} & set(directions)):
        raise ValueError("label_smoothing takes q_to_k and k_to_q alone, without masks, ids and hardness")
    positive = scale * similarity
    both = "k_to_q" in directions
    stats = c.q_to_k(columns=both and c.plain)
    forward = together([stats.neg_lse, c.own_negatives()])
    backward = None
    if both:
        backward = stats.columns.neg_lse[: q.shape[0]] if c.plain else c.k_to_q()
    means = []
    if label_smoothing:
        means = [c.mean_logit(k_to_q) for k_to_q in ((False, True) if both else (False,))]
    if partition == "per_direction":
        values = [_nll(lse, positive, 1) for lse in (forward, backward) if lse is not None]
        if label_smoothing:
            values = [_smoothed(v, positive, [m], label_smoothing) for v, m in zip(values, means, strict=True)]
        nll = torch.stack(values).mean(0)
    else:
        parts = [forward, backward]
        if "q_to_q" in directions:
            parts.append(c.q_to_q())
        if "k_to_k" in directions:
            parts.append(c.k_to_k(keys_meet_negatives))
        nll = _nll(together(parts), positive, 2 if both else 1)
        if label_smoothing:
            nll = _smoothed(nll, positive, means, label_smoothing)
    return reduce(focal_weighted(nll, focal_gamma), reduction)


@catalogue.entry(
    formula="InfoNCE over q-k, q-q and k-k without the candidates that a guide finds closer to q_i than k_i, less a margin",
    gradient="as `info_nce`",
    source="GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
    published="temperature 0.01, margin 0 (absolute); hard negatives are no candidates of k-k",
)
def gist_embed_loss(
    q: Tensor, k: Tensor, guide: GuideEmbeddings, temperature: Temperature = 0.01, *, negatives: Tensor | None = None,
    contrast_anchors: bool = True, contrast_positives: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """GISTEmbed: `info_nce` whose false negatives are found by a guide model.

    Args:
        q, k: [B, D]; negatives: [B, M, D] or None, shared by all rows. guide: the guide's embeddings of the same texts, and
            the margin.
        temperature: > 0. contrast_anchors, contrast_positives: whether q meets q, and k meets k.
        reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError as `info_nce`. Source: GISTEmbed: Guided In-sample Selection of Training Negatives for Text
    Embedding Fine-tuning.
    """
    more = [name for name, on in (("q_to_q", contrast_anchors), ("k_to_k", contrast_positives)) if on]
    return info_nce(
        q, k, scale_of(temperature), negatives=negatives, directions=("q_to_k", *more), guide=guide,
        keys_meet_negatives=False, reduction=reduction,
    )  # fmt: skip


class InfoNCELoss(LossModule):
    """`info_nce` with its options fixed; embeddings, candidates and ids are given at the call."""

    def __init__(
        self, scale: float = 20.0, *, directions: Sequence[str] = ("q_to_k",), partition: str = "joint",
        hardness_mode: str | None = None, hardness: float | None = None, own_margin: float | None = None,
        share_negatives: bool = True, label_smoothing: float = 0.0, focal_gamma: float = 0.0, normalize: bool = True,
        reduction: str = "mean",
    ) -> None:  # fmt: skip
        scale_of(scale, "scale")
        _check_directions(directions, partition)
        _strengths(hardness_mode, hardness)
        super().__init__(
            info_nce, scale=scale, directions=tuple(directions), partition=partition, hardness_mode=hardness_mode,
            hardness=hardness, own_margin=own_margin, share_negatives=share_negatives,
            label_smoothing=label_smoothing, focal_gamma=focal_gamma, normalize=normalize, reduction=reduction,
        )  # fmt: skip
