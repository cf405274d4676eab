"""Auxiliary losses of mixture-of-experts routers: functions of the gate logits [tokens, E], E the (few) experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .entropy import lse_penalty, tsallis_entropy

_SWITCH = "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
_MIXLORA = "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA based Mixture of Experts"
_DYNMOLE = "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism"


def _probabilities(gate_logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p [tokens, E] with 0 on tokens that do not count, share [tokens, 1] of each token in a mean)."""
    if gate_logits.dim() < 1 or gate_logits.shape[-1] < 1:
        raise ValueError(f"gate_logits must be [..., E] with at least one expert, got {tuple(gate_logits.shape)}")
    z = gate_logits.reshape(-1, gate_logits.shape[-1])
    if valid is not None and valid.shape != gate_logits.shape[:-1]:
        raise ValueError(f"valid must have shape {tuple(gate_logits.shape[:-1])}, got {tuple(valid.shape)}")
    counts = torch.ones_like(z[:, :1], dtype=torch.bool) if valid is None else valid.reshape(-1, 1).bool()
    p = torch.softmax(torch.where(counts, z, 0.0), -1, dtype=torch.promote_types(z.dtype, torch.float32))
    return torch.where(counts, p, 0.0), counts / counts.sum().clamp(min=1).to(p.dtype)


@catalogue.entry(
    formula="coefficient E sum_j f_j P_j, f_j = share of tokens with expert j in their top k, P_j = mean of p_j",
    gradient="(coefficient E / N) p_ij (f_j - sum_l p_il f_l)",
    source=f"{_SWITCH}; {_MIXLORA}",
)
def load_balance(
    gate_logits: Tensor, *, top_k: int = 2, coefficient: float = 1e-3, valid: Tensor | None = None
) -> Tensor:
    """coefficient E sum_j f_j P_j of gate logits [..., E], one number: least where all experts get as many tokens.

    f_j counts choices (top_k of them a token) and is a constant; P_j, the mean probability, carries the gradient.
    valid [...]: True where a token counts; padding does not. top_k = 1, coefficient = 1e-2 is Switch Transformers', top_k = 2,
    coefficient = 1e-3 MixLoRA's. Raises ValueError for top_k outside [1, E].
    """
    p, share = _probabilities(gate_logits, valid)
    experts = p.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in [1, {experts}], got {top_k}")
    chosen = torch.zeros_like(p).scatter(1, p.detach().topk(top_k, -1).indices, 1.0)
    frequency = (chosen * share).sum(0)
    return coefficient * experts * (frequency * (p * share).sum(0)).sum()


@catalogue.row(
    formula="coefficient lse^2",
    gradient="2 coefficient lse p_j",
    source="ST-MoE: Designing Stable and Transferable Sparse Expert Models",
)
def router_z_loss(stats: RowStats, *, coefficient: float = 1e-3) -> Tensor:
    """coefficient lse^2 of gate logits, one value a token: `row_loss(gate_logits, None, router_z_loss)` is its mean.

    Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022), with 1e-3.
    """
    return lse_penalty(stats, coefficient=coefficient)


@catalogue.row(
    formula="coefficient (1 - sum_j p_j^q) / (1 - E^(1 - q))",
    gradient="that of tsallis_entropy",
    source=_DYNMOLE,
    statistics=("tempered_lse",),
    temperature=lambda q=1.1, **_: 1 / q,
    published="calls its entropy with a keyword that does not exist, and adds 1e-5 to every p; here the entropy of p itself",
)
def dynmole_entropy(stats: RowStats, *, q: float = 1.1, coefficient: float = 1e-2) -> Tensor:
    """coefficient times the normalised Tsallis entropy of gate logits, one value a token: `row_loss(gate, None, ...)`.

    "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism", with q = 1.1 and 0.01.
    """
    return coefficient * tsallis_entropy(stats, q=q, normalize=True)


@catalogue.entry(
    formula="all experts where the normalised Tsallis entropy > threshold, else the top-p ones and at least keep_top_k",
    gradient="none: a mask",
    source=_DYNMOLE,
)
@torch.no_grad()
def dynmole_routing(
    gate_logits: Tensor, *, top_p: float = 0.75, keep_top_k: int = 2, threshold: float = 0.9, q: float = 1.1
) -> Tensor:
    """The experts that DynMoLE gives each token to: bool, the shape of gate_logits [..., E].

    Experts in descending order of probability while their sum is <= top_p, and at least keep_top_k; all of them where the
    normalised Tsallis entropy of index q is above the threshold.
    """
    p = torch.softmax(gate_logits, -1, dtype=torch.promote_types(gate_logits.dtype, torch.float32))
    ordered, columns = p.sort(-1, descending=True)
    keep = ordered.cumsum(-1) <= top_p
    keep[..., :keep_top_k] = True
    experts = p.shape[-1]
    if q == 1:
        entropy = torch.special.entr(p).sum(-1) / torch.tensor(float(max(experts, 2))).log()
    else:
        entropy = (1 - (p**q).sum(-1)) / (1 - max(experts, 2) ** (1 - q))
    return torch.zeros_like(keep).scatter(-1, columns, keep) | (entropy > threshold)[..., None]


@catalogue.entry(
    formula="coefficient E sum_j f_j P_j, f_j = mean of p_j over the tokens that expert j is given, 0 elsewhere",
    gradient="(coefficient E / N) p_ij (u_ij - sum_l p_il u_il), u_ij = f_j + P_j mask_ij",
    source=_DYNMOLE,
)
def dynmole_load_balance(
    gate_logits: Tensor, mask: Tensor, *, coefficient: float = 1e-3, valid: Tensor | None = None
) -> Tensor:
    """`load_balance` whose frequencies are mean masked routing weights: the gradient flows through both factors.

    mask: bool [..., E], the experts of each token, from `dynmole_routing`. Raises ValueError for a mask of another shape.
    """
    if mask.shape != gate_logits.shape:
        raise ValueError(
            f"mask must have the shape of gate_logits, {tuple(gate_logits.shape)}, got {tuple(mask.shape)}"
        )
    p, share = _probabilities(gate_logits, valid)
    weights = torch.where(mask.reshape(p.shape).bool(), p, 0.0)
    return coefficient * p.shape[1] * ((weights * share).sum(0) * (p * share).sum(0)).sum()
