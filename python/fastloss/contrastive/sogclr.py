"""SogCLR and iSogCLR: the contrastive objective over the whole data set, by a moving average of each sample's denominator.

All state lives in buffers on the device and is read and written by index there: no step waits for the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import pair_stats
from .dots import check_pair, scale_of
from .ntxent import view_stats
from .reduction import check_reduction, reduce


class _Sides(NamedTuple):
    """Both sides of a batch, one after the other, [2B]: views, or images then texts."""

    log_mean: Tensor  # log of the mean over negatives of e^(what is averaged / tau)
    mean: Tensor | None  # E of the same exponent under the softmax of the negatives
    pull: Tensor | None  # what the objective subtracts beside the average: s_ip where it is of e^(s / tau)


def moving_average(log_u: Tensor, log_mean: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma) u + gamma e^log_mean), e^log_mean itself where u is still 0."""
    old = log_u + (math.log1p(-gamma) if gamma < 1 else -math.inf)
    new = log_u == -math.inf
    both = torch.logaddexp(torch.where(new, 0.0, old), log_mean + math.log(gamma))
    return torch.where(new, log_mean, both)


@catalogue.entry(
    formula="mean_i tau log u_i - s_ip, u_i a moving average of the mean of e^(s_in / tau) over the negatives",
    gradient="e^(s_in / tau) / (u_i N) on negatives: an unbiased denominator at every batch size",
    source="Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm Performance",
    published="gamma 0.9; tau 0.1 of two views, 0.01 of image and text",
)
class SogCLRLoss(nn.Module):
    """The global contrastive loss, whose denominators are averages over all steps, so that small batches do no harm.

        unimodal:  F = mean_i [tau log E_n e^(s_in / tau) - s_ip],  of two views, negatives are the 2B - 2 views of other samples
        bimodal:   F = mean_i [tau log E_n e^((s_in - s_ii) / tau)],  of images and of texts, negatives are the B - 1 others
        u_i <- (1 - gamma) u_i + gamma mean over the batch of e^(. / tau);   dF / ds_in = e^(. / tau) / (u_i N)

    A sample that is seen for the first time starts with its own mean (gamma = 1). Kept is log u, which cannot overflow.
    The value is the objective (of the averages u), not LibAUC's surrogate; its gradient is the published one. Both sides are
    averaged.

    Args:
        num_samples: n of the data set.
        modality: "unimodal" (LibAUC's v1: temperature 0.1) or "bimodal" (v2: 0.01).
        temperature: tau > 0, None for the default of the modality.
        gamma: share of the new value, in (0, 1]; LibAUC's cosine schedule sets the attribute once an epoch.
        normalize: similarities are cosines.
        reduction: "mean", "sum" or "none" ([2B]).
        dtype, device: of the buffer log_u, [n] or [2, n].

    LibAUC 2.0.1's v2 sums over the negatives where the objective takes their mean: its gradient is B - 1 times ours.
    Source: Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm Performance.
    """

    log_u: Tensor

    def __init__(
        self, num_samples: int, temperature: float | None = None, *, modality: str = "unimodal", gamma: float = 0.9,
        normalize: bool = True, reduction: str = "mean", dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_reduction(reduction)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an integer >= 1, got {num_samples!r}")
        if modality not in ("unimodal", "bimodal"):
            raise ValueError(f"modality must be unimodal or bimodal, got {modality!r}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        if temperature is None:
            temperature = 0.1 if modality == "unimodal" else 0.01
        scale_of(temperature)
        self.num_samples, self.temperature, self.modality, self.gamma = num_samples, temperature, modality, gamma
        self.normalize, self.reduction = normalize, reduction
        self.register_buffer("log_u", self._state(-math.inf, dtype, device))

    def _state(self, value: float, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
        """One number a sample, in both modalities of a pair."""
        shape = (1 if self.modality == "unimodal" else 2, self.num_samples)
        return torch.full(shape, value, dtype=dtype, device=device)

    def _read(self, state: Tensor, index: Tensor) -> Tensor:
        """A state of both sides, [2B]: two views share one."""
        return state[:, index].expand(2, -1).reshape(-1)

    @torch.no_grad()
    def _write(self, state: Tensor, index: Tensor, values: Tensor) -> None:
        sides = values.view(2, -1).to(state)
        state.index_copy_(1, index, sides.mean(0, keepdim=True) if state.shape[0] == 1 else sides)

    def _check(self, q: Tensor, k: Tensor, index: Tensor) -> None:
        check_pair(q, k)
        if q.shape[0] < 2:
            raise ValueError(f"a batch must hold two samples at least, got {q.shape[0]}")
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be int64 or int32, got {index.dtype}")
        if index.shape != q.shape[:1]:
            raise ValueError(f"index must have shape [{q.shape[0]}], got {list(index.shape)}")

    def _sides(self, q: Tensor, k: Tensor, tau: Tensor | None, mean: bool) -> _Sides:
        """tau: [2B] of the sides, None for one number."""
        b = q.shape[0]
        if self.modality == "unimodal":
            scale = 1 / self.temperature if tau is None else 1 / tau
            stats = view_stats(q, k, scale, self.normalize, mean)
            pull = stats.pos_sum * (self.temperature if tau is None else tau)
            return _Sides(stats.neg_lse - math.log(2 * b - 2), stats.neg_mean if mean else None, pull)
        if tau is None:
            both = pair_stats(q, k, scale=1 / self.temperature, normalize=self.normalize)
            parts = [both, both.columns]
        else:
            parts = [
                pair_stats(x, y, scale=1 / t, normalize=self.normalize, mean=mean, columns=False)
                for x, y, t in ((q, k, tau[:b]), (k, q, tau[b:]))
            ]
        log_mean = torch.cat([s.neg_lse - s.pos_sum for s in parts]) - math.log(b - 1)
        return _Sides(log_mean, torch.cat([s.neg_mean - s.pos_sum for s in parts]) if mean else None, None)

    def _loss(self, sides: _Sides, log_u: Tensor, tau: Tensor | float, rho: float) -> Tensor:
        """The objective by value, the published estimate by gradient: d tau e^(log_mean - log u), u fixed."""
        estimate = tau * torch.exp(sides.log_mean - log_u)
        values = tau * (log_u + rho) + (estimate - estimate.detach())
        return reduce(values if sides.pull is None else values - sides.pull, self.reduction)

    def _average(self, sides: _Sides, index: Tensor) -> Tensor:
        """log u of both sides after this step, [2B], no gradient; kept while training."""
        log_u = moving_average(self._read(self.log_u, index), sides.log_mean.detach().to(self.log_u), self.gamma)
        if self.training:
            kept = log_u
            if self.modality == "unimodal":  # the mean of u over the two views, not of its logarithm
                kept = (torch.logaddexp(*log_u.view(2, -1)) - math.log(2)).repeat(2)
            self._write(self.log_u, index, kept)
        return log_u.to(sides.log_mean.dtype)

    def forward(self, q: Tensor, k: Tensor, index: Tensor) -> Tensor:
        """The loss of two views (or images and texts) [B, D], B >= 2, of the samples `index` [B] of the data set."""
        self._check(q, k, index)
        index = index.long()
        sides = self._sides(q, k, None, False)
        return self._loss(sides, self._average(sides, index), self.temperature, 0.0)

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.num_samples}, temperature={self.temperature}, modality={self.modality}, gamma={self.gamma}"


@catalogue.entry(
    formula="mean_i tau_i (log u_i + rho) - s_ip, tau_i of each sample by a projected step with momentum",
    gradient="as SogCLRLoss; tau: log u + rho - mean of (e^(s_in / tau) / u) s_in / tau",
    source="Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature "
    "Individualization",
    published="LibAUC: rho 0.3 or 6, eta 0.01; authors: rho 6 or 8, eta 0.001, gradient clipped at 3 or 5",
)
class ISogCLRLoss(SogCLRLoss):
    """iSogCLR: SogCLR with a temperature of each sample, robust (RGCL): F + tau_i rho, minimised in tau_i too.

        g_i = log u_i + rho - mean over negatives of (e^(. / tau_i) / u_i) (. / tau_i)        (clipped to +-grad_clip)
        m_i <- (1 - beta) m_i + beta g_i;   tau_i <- clamp(tau_i - eta m_i, tau_min, tau_max)

    with "." as in `SogCLRLoss`: s_in (unimodal, the mean g of both views) or s_in - s_ii (bimodal, a temperature each for image
    and text). The loss is that of the temperatures before the step.

    Args:
        num_samples, modality, gamma, normalize, reduction, dtype, device: as `SogCLRLoss`.
        temperature, rho, eta, beta, tau_min, tau_max, grad_clip: None for LibAUC's defaults: 0.1, 0.3, 0.01, 0.9, 0.05, 0.7
            (unimodal, v1), 0.01, 6.0, 0.01, 0.9, 0.005, 0.05 (bimodal, v2), no clip. `authors` makes one with those of the
            authors' scripts.

    Buffers: log_u, tau, tau_gradient (m). Source: Not All Semantics are Created Equal: Contrastive Self-supervised Learning with
    Automatic Temperature Individualization.
    """

    tau: Tensor
    tau_gradient: Tensor

    def __init__(
        self, num_samples: int, temperature: float | None = None, *, modality: str = "unimodal", gamma: float = 0.9,
        rho: float | None = None, eta: float = 0.01, beta: float = 0.9, tau_min: float | None = None,
        tau_max: float | None = None, grad_clip: float | None = None, normalize: bool = True, reduction: str = "mean",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_samples, temperature, modality=modality, gamma=gamma, normalize=normalize, reduction=reduction,
            dtype=dtype, device=device,
        )  # fmt: skip
        low, high, weight = (0.05, 0.7, 0.3) if modality == "unimodal" else (0.005, 0.05, 6.0)
        self.rho = weight if rho is None else rho
        self.tau_min, self.tau_max = low if tau_min is None else tau_min, high if tau_max is None else tau_max
        if not 0 < self.tau_min <= self.tau_max:
            raise ValueError(f"0 < tau_min <= tau_max is needed, got {self.tau_min} and {self.tau_max}")
        for name, value in (("eta", eta), ("rho", self.rho)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta}")
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0 or None, got {grad_clip}")
        self.eta, self.beta, self.grad_clip = eta, beta, grad_clip
        self.register_buffer("tau", self._state(self.temperature, dtype, device))
        self.register_buffer("tau_gradient", self._state(0.0, dtype, device))

    @classmethod
    def authors(cls, num_samples: int, modality: str = "unimodal", **more: float) -> ISogCLRLoss:
        """With the defaults of the authors' scripts: gamma 0.8 and eta 0.001; unimodal rho 6, tau from 0.1 in [0.05, 1], clip 3;
        bimodal rho 8, tau from 0.01 in [0.005, 0.05], clip 5."""
        options: dict[str, float] = {"temperature": 0.01, "rho": 8.0, "grad_clip": 5.0}
        if modality == "unimodal":
            options = {"temperature": 0.1, "rho": 6.0, "grad_clip": 3.0, "tau_max": 1.0}
        return cls(num_samples, modality=modality, **{"gamma": 0.8, "eta": 0.001, **options, **more})  # type: ignore[arg-type]

    def forward(self, q: Tensor, k: Tensor, index: Tensor) -> Tensor:
        """As `SogCLRLoss`; while training, the temperatures of these samples take a step."""
        self._check(q, k, index)
        index = index.long()
        tau = self._read(self.tau, index).to(torch.promote_types(q.dtype, torch.float32))
        sides = self._sides(q, k, tau, True)
        log_u = self._average(sides, index)
        if self.training and sides.mean is not None:
            share = torch.exp(sides.log_mean.detach() - log_u)
            self._step(index, log_u + self.rho - share * sides.mean.detach())
        return self._loss(sides, log_u, tau, self.rho)

    @torch.no_grad()
    def _step(self, index: Tensor, gradient: Tensor) -> None:
        if self.modality == "unimodal":
            gradient = gradient.view(2, -1).mean(0).repeat(2)
        if self.grad_clip is not None:
            gradient = gradient.clamp(-self.grad_clip, self.grad_clip)
        old, tau = self._read(self.tau_gradient, index), self._read(self.tau, index)
        momentum = (1 - self.beta) * old + self.beta * gradient.to(old)
        self._write(self.tau_gradient, index, momentum)
        self._write(self.tau, index, (tau - self.eta * momentum).clamp(self.tau_min, self.tau_max))
