"""Regions as users call them: statistics of a segmentation's logits, and any loss made of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import region_autograd
from .autograd import can_look
from .contract import RegionWant
from .losses import catalogue
from .region_statistics import RegionStats
from .row_loss import check_reduction

_WANT = {"squared": RegionWant.SQUARES, "bce": RegionWant.CROSS_ENTROPY, "entropy": RegionWant.ENTROPY}
_PER = ("sample", "class", "sample_class", "batch")
_ACTIVATIONS = ("sigmoid", "softmax", "none")
#: Below so many pixels the values of a class are copied together, instead of one region for each sample.
_SHORT = 256


def _want(names: Iterable[str], activation: str, sharpness: float | None) -> RegionWant:
    want = RegionWant.NOTHING
    for name in (names,) if isinstance(names, str) else names:
        if name not in _WANT:
            raise ValueError(f"unknown statistic {name!r}: one of {', '.join(_WANT)}")
        want |= _WANT[name]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if activation != "sigmoid":
        if want & (RegionWant.CROSS_ENTROPY | RegionWant.ENTROPY):
            raise ValueError(f'"bce" and "entropy" need logits and activation "sigmoid", got {activation!r}')
        want |= RegionWant.PROBABILITIES
    if sharpness is not None:
        if not (sharpness > 0 and math.isfinite(sharpness)):
            raise ValueError(f"sharpness must be finite and > 0, or None; got {sharpness}")
        want |= RegionWant.SHARP
    return want


class _Labels(NamedTuple):
    """What the user gave as target and mask, as [B, C, P]; a mask that all classes share is [B, 1, P]."""

    target: Tensor
    mask: Tensor | None


def _check_integers(target: Tensor, classes: int, ignore_index: int | None, error: type[Exception]) -> None:
    """Raise where a label is not in [0, classes): on a CPU, where looking costs no synchronisation."""
    if not can_look(target) or not target.numel():
        return
    bad = (target < 0) | (target >= classes)
    bad = bad if ignore_index is None else bad & (target != ignore_index)
    if bad.any():
        accepted = f"0..{classes - 1}" + ("" if ignore_index is None else f", or ignore_index {ignore_index}")
        raise error(f"target {int(target[bad][0])} is out of bounds: labels are {accepted}")


def _labels(logits: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int | None) -> _Labels:
    """Check target and mask against logits [B, C, *spatial]."""
    b, c = logits.shape[0], logits.shape[1] if logits.dim() > 1 else 1
    pixels = (b, *logits.shape[2:])
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, the logits on {logits.device}")
    if target.requires_grad:
        raise ValueError("the gradient with respect to `target` is not computed: pass target.detach()")
    kind = target.dtype
    if target.is_complex():
        raise TypeError(f"target must be floating, bool or integer, got {kind}")
    ids = target.shape != logits.shape
    if ids and (logits.dim() < 2 or target.shape != pixels or target.is_floating_point() or kind == torch.bool):
        raise ValueError(
            f"target must have the shape of the logits {tuple(logits.shape)}, or hold class ids (an integer dtype) "
            f"in shape {pixels}; got {tuple(target.shape)} {kind}"
        )
    target = target.reshape(b, 1 if ids else c, math.prod(pixels[1:]))
    counts = None
    if ignore_index is not None and kind != torch.bool:
        counts = target != ignore_index
    if ids:
        _check_integers(target, c, ignore_index, IndexError)
        target = target == torch.arange(c, device=target.device)[:, None]
    elif kind.is_floating_point:
        exact = logits.dtype if logits.dtype == torch.float64 else torch.float32
        target = target if kind == logits.dtype else target.to(exact)
    elif kind != torch.bool:
        _check_integers(target, 2, ignore_index, ValueError)
        target = target == 1
    if mask is None:
        return _Labels(target, counts)
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"mask must be torch.bool or torch.uint8, got {mask.dtype}")
    if mask.device != logits.device:
        raise ValueError(f"mask is on {mask.device}, the logits on {logits.device}")
    if mask.shape != logits.shape and (logits.dim() < 2 or mask.shape not in (pixels, (b, 1, *pixels[1:]))):
        raise ValueError(
            f"mask must have the shape of the logits {tuple(logits.shape)}, or that of the pixels {pixels}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.reshape(b, c if mask.shape == logits.shape else 1, math.prod(pixels[1:]))
    return _Labels(target, mask if counts is None else (mask != 0) & counts)


def _regions(t: Tensor, per: str, direct: bool) -> Tensor:
    """[B, C, P] as contiguous regions [R, size]: those asked for, or one for each sample and class, to be summed."""
    b, c, p = t.shape
    if direct and per == "class":
        return t.transpose(0, 1).reshape(c, b * p)
    if direct and per == "sample":
        return t.reshape(b, c * p).contiguous()
    if direct and per == "batch":
        return t.reshape(1, b * c * p).contiguous()
    return t.reshape(b * c, p).contiguous()


def _gather(table: Tensor, per: str, direct: bool, b: int, c: int) -> Tensor:
    """The table [10, R] of the regions above as [10, *regions asked for]; statistics are sums, so they add up."""
    if direct:
        shape = {"sample": (b,), "class": (c,), "sample_class": (b, c), "batch": ()}[per]
        return table.reshape(len(table), *shape)
    return table.reshape(len(table), b, c).sum({"sample": (2,), "class": (1,), "batch": (1, 2)}[per])


def region_stats(
    logits: Tensor,
    target: Tensor,
    *,
    per: str = "sample",
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    stats: Iterable[str] = (),
    sharpness: float | None = None,
    activation: str = "sigmoid",
) -> RegionStats:
    """Statistics of regions of logits [B, C, *spatial] (or [B]), whose p is sigmoid(logit): see `RegionStats`.

    One read of logits and target; the backward reads them once more and writes the gradient once.

    Args:
        logits: float32, float16, bfloat16 (float64 by plain PyTorch). What is not contiguous, channels_last for one, is
            copied first.
        target: labels in [0, 1] in the logits' shape (floating, bool, or integers 0 and 1), or class ids [B, *spatial]
            (an integer dtype). bool and uint8 are the least to read. Floating labels are not checked.
        per: what one region is. "sample": [B], all classes and pixels of it; "class": [C], over the batch;
            "sample_class": [B, C]; "batch": [], everything.
        mask: bool or uint8, in the logits' shape or [B, *spatial] or [B, 1, *spatial]; where it is 0 a pixel does not
            count: its logit is not used and its gradient is 0.
        ignore_index: a target of this value does not count, for example 255.
        stats: further statistics by name: "squared", "bce", "entropy".
        sharpness: L of AnyLoss: p becomes sigmoid(L (p - 1/2)).
        activation: "sigmoid"; "softmax" over C by torch; "none": `logits` are probabilities, and so is the gradient.

    Raises:
        ValueError: shapes, devices, names or numbers that do not fit; integer labels (on a CPU) that are neither 0 nor 1.
        IndexError: class ids out of range, on a CPU. On a GPU such a pixel belongs to no class.
        TypeError: dtypes that are not taken.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have a batch dimension, got a scalar")
    if per not in _PER:
        raise ValueError(f"per must be one of {', '.join(_PER)}, got {per!r}")
    want = _want(stats, activation, sharpness)
    labels = _labels(logits, target, mask, ignore_index)
    b, c = logits.shape[0], logits.shape[1] if logits.dim() > 1 else 1
    if activation == "softmax":
        if logits.dim() < 2:
            raise ValueError(f'activation "softmax" needs logits [B, C, ...], got {tuple(logits.shape)}')
        if labels.mask is not None:  # softmax would carry a NaN of a pixel that does not count into its gradient
            counted = (labels.mask != 0).any(1, keepdim=True).reshape(b, 1, *logits.shape[2:])
            logits = torch.where(counted, logits, 0.0)
        logits = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if labels.target.is_floating_point():
            labels = labels._replace(target=labels.target.to(logits.dtype))
    x = logits.reshape(b, c, math.prod(logits.shape[2:]))
    counts, shared = labels.mask, False
    if counts is not None and counts.shape[1] != c:
        shared = x.shape[2] >= _SHORT
        counts = counts if shared else counts.expand(x.shape)
    direct = per == "sample_class" or (per == "class" and x.shape[2] < _SHORT) or (per != "class" and not shared)
    if counts is not None:
        counts = counts.reshape(b, -1).contiguous() if shared else _regions(counts, per, direct)
    rows = _regions(x, per, direct), _regions(labels.target, per, direct)
    table = region_autograd.region_stats(*rows, counts, int(want), float(sharpness or 1.0))
    return RegionStats(_gather(table, per, direct, b, c), want)


def check_arguments(loss: Callable[..., Tensor], arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for names that neither the loss nor `region_stats` takes."""
    known = {*list(inspect.signature(loss).parameters)[1:], *list(inspect.signature(region_stats).parameters)[2:]}
    if unknown := sorted(set(arguments) - known):
        raise TypeError(f"unknown arguments {', '.join(unknown)}: {', '.join(sorted(known))} are taken")


def region_loss(
    logits: Tensor, target: Tensor, loss: Callable[..., Tensor], *, reduction: str = "mean", **arguments: Any
) -> Tensor:
    """loss(region_stats(logits, target, ...), ...), reduced over the regions that have a pixel that counts.

    `loss` maps RegionStats to one value a region: one of `fastloss.losses`, or the user's own. `arguments` are those of
    the loss (by the names in its signature) and those of `region_stats`; a loss of `fastloss.losses` names the
    statistics that it needs by itself.

    >>> fastloss.region_loss(logits, target, fastloss.losses.tversky, alpha=0.3, per="class")  # doctest: +SKIP
    """
    check_reduction(reduction)
    own, engine = catalogue.split_arguments(loss, arguments)
    s = region_stats(logits, target, **engine)
    values = loss(s, **own)
    if values.shape != s.shape:
        raise ValueError(f"a region loss returns one value a region, shape {tuple(s.shape)}; got {tuple(values.shape)}")
    counted = s.count > 0
    values = torch.where(counted, values, 0.0)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / counted.sum()
