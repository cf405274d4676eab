"""Drop-in losses: every loss of torch.nn.functional under its own name and signature.

`cross_entropy` and `linear_cross_entropy` run on fastloss kernels, and so do the losses of pointwise.py; the other names
are torch's own functions. What no kernel takes goes to PyTorch, never to an error, so that swapping the import is always
safe.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy,
    cosine_embedding_loss,
    ctc_loss,
    gaussian_nll_loss,
    hinge_embedding_loss,
    huber_loss,
    l1_loss,
    margin_ranking_loss,
    mse_loss,
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
    nll_loss,
    poisson_nll_loss,
    smooth_l1_loss,
    soft_margin_loss,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)

from . import autograd, compiled, fused, losses, registry
from .contract import Needs, Want
from .engine import check_grad_weight, check_head, extra_bytes, shifted
from .engine import options as row_options
from .fused import Formula, denominator, pack
from .passed_through import explained as _explained
from .pointwise import binary_cross_entropy_with_logits, kl_div
from .statistics import RowStats

if TYPE_CHECKING:
    from .lossless import CompressedTensor

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "ctc_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]

#: Where some compiled or Triton kernel can run; elsewhere PyTorch's own composition is as good as ours.
_HAS_KERNELS = {
    "cpu": compiled.MISSING is None,
    "cuda": bool(getattr(compiled._C, "cuda", False)) or importlib.util.find_spec("triton") is not None,
}
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Extras:
    """The keyword-only arguments that torch does not have."""

    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    shift: bool = False
    returns: tuple[str, ...] = ()

    def used(self) -> list[str]:
        """Names of the arguments that are in use."""
        defaults = _Extras()
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(defaults, f.name)]

    def want(self, smoothing: float) -> int:
        """The statistics that these arguments need."""
        if not self.returns:
            return Want.SUM.value if smoothing else 0
        unknown = [r for r in self.returns if r not in ("lse", "accuracy", "entropy")]
        if unknown:
            raise ValueError(f'returns takes "lse", "accuracy" and "entropy", got {unknown[0]!r}')
        accuracy = Want.ARGMAX if "accuracy" in self.returns else Want.NOTHING
        entropy = Want.ENTROPY if "entropy" in self.returns else Want.NOTHING
        return int(accuracy | entropy | (Want.SUM if smoothing else Want.NOTHING))


def _extras(z_loss: float, softcap: float | None, scale: float, shift: bool, returns: Iterable[str]) -> _Extras:
    if isinstance(z_loss, Tensor) and z_loss.requires_grad:
        raise TypeError("z_loss is a number; its gradient is not computed")
    return _Extras(z_loss, softcap, scale, shift, (returns,) if isinstance(returns, str) else tuple(returns))


def _check_tensors(**tensors: object) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _refuse(extras: _Extras, why: str) -> None:
    """torch has none of these arguments: they are honoured or refused, never dropped."""
    if used := extras.used():
        raise ValueError(f"{', '.join(used)} cannot be used here: {why}")


def _plain(*tensors: Tensor | None) -> bool:
    """Ordinary dense tensors: no DTensor or other wrapper that has rules of its own, not sparse."""
    for t in tensors:
        if t is None or type(t) in (Tensor, torch.nn.Parameter):
            continue
        if torch.overrides.has_torch_function((t,)):
            return False
        if not isinstance(t, Tensor) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(t):
            return False
    return all(t is None or t.layout == torch.strided for t in tensors)


def _on_kernels(x: Tensor, extras: _Extras) -> bool:
    """Whether fastloss ops should run on x rather than PyTorch's composition."""
    if extras.used() or (x.dtype in _KERNEL_DTYPES and _HAS_KERNELS.get(x.device.type, False)):
        return True
    return not torch.compiler.is_compiling() and registry.forced() is not None


def _autocast(x: Tensor) -> bool:
    try:
        return torch.is_autocast_enabled(x.device.type)
    except RuntimeError:  # a device type without autocast, such as meta
        return False


def _tracing() -> bool:
    """torch.jit.trace records torch's operations, not what happens inside ours."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _weight_fits(weight: Tensor | None, vocab: int, like: Tensor) -> bool:
    if weight is None:
        return True
    dtypes = (like.dtype, torch.float32) if _autocast(like) else (like.dtype,)
    on_device = weight.device == like.device and not weight.requires_grad
    return weight.shape == (vocab,) and weight.dtype in dtypes and on_device


def _empty(input: Tensor, extras: _Extras) -> bool:
    """No rows, which torch may have: it knows best what to return. Not asked of a symbolic size."""
    return not torch.compiler.is_compiling() and not input.numel() and not extras.used()


def _legal(reduction: str, label_smoothing: float) -> bool:
    return reduction in ("none", "mean", "sum") and 0.0 <= label_smoothing <= 1.0


def _finish(
    s: RowStats, target: Tensor | None, weight: Tensor | None, smoothing: float, extras: _Extras, reduction: str
) -> Tensor:
    """The reduced (or not) cross entropy of differentiable statistics."""
    rows = losses.cross_entropy(s, class_weight=weight, label_smoothing=smoothing, z_loss=extras.z_loss)
    if reduction == "none":
        return rows
    share = 1 / denominator(target, rows.numel(), weight, s.ignore_index, reduction, rows.detach())
    return rows.sum() * share


def _numbers(s: RowStats, returns: tuple[str, ...], shape: torch.Size) -> dict[str, Tensor]:
    return {name: getattr(s, name).reshape(shape) for name in returns}


def _fusable(reduction: str, extras: _Extras, prob: Tensor | None) -> bool:
    """The gradient, if one is needed, can be made in the forward: a scalar loss, and no transform but backward."""
    return (
        reduction != "none"
        and not extras.returns
        and not (prob is not None and prob.requires_grad)
        and not autograd.functorch_active()
        and not autograd.forward_mode_active()
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    returns: Iterable[str] = (),
) -> Any:
    """torch.nn.functional.cross_entropy, with the same arguments, shapes, dtypes and results.

    -log softmax(input)[target] along dim 1, with class weights, label smoothing or target probabilities as torch has
    them. Gradients are exact to rounding also where p of the target is close to 1 and where logits have a large offset.

    Beyond torch, keyword-only: `z_loss` adds z_loss * lse^2 a row (PaLM); `softcap` c uses c tanh(z / c); `logit_scale`
    multiplies the logits first; `shift` compares position t with the target of t + 1 along the last target dim (causal
    language models; no copy of the logits); `returns` adds a dict with any of "lse", "accuracy", "entropy" a row:
    (loss, {"lse": ...}).

    Raises what torch raises, with the shapes, dtypes and devices given; IndexError (CPU) for a class id out of range.
    """
    _check_tensors(input=input, target=target)
    extras = _extras(z_loss, softcap, logit_scale, shift, returns)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)

    def by_torch(why: str) -> Any:
        _refuse(extras, why)
        return _explained(
            lambda: F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing),
            "cross_entropy", input=input, target=target, weight=weight,
        )  # fmt: skip

    if not _plain(input, target, weight) or _tracing():
        return by_torch("a tensor has rules of its own (a subclass, or not dense), or torch.jit.trace is recording")
    if not (input.dim() >= 1 and input.is_floating_point() and _legal(reduction, label_smoothing)):
        return by_torch(f"input is {tuple(input.shape)} {input.dtype}, reduction {reduction!r}")
    if target.device != input.device or not _on_kernels(input, extras):
        return by_torch(f"target is on {target.device}, input on {input.device}")
    vocab = input.shape[1] if input.dim() > 1 else input.shape[0]
    soft = target.shape == input.shape
    batch = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if shift and soft:
        raise ValueError("shift needs class ids as target, got probabilities")
    if soft and target.dtype != input.dtype and extras.used():
        target = target.to(torch.float32 if target.is_floating_point() else target.dtype)
    if target.dtype == torch.uint8 and not soft:
        target = target.to(torch.int64)
    if soft:
        fits = target.dtype in (input.dtype, torch.float32) and ignore_index < 0
    else:
        fits = target.shape == batch and target.dtype == torch.int64
    if not fits or not _weight_fits(weight, vocab, input) or not vocab or _empty(input, extras):
        return by_torch(f"input {tuple(input.shape)}, target {tuple(target.shape)} {target.dtype}, or the weight")
    kind = _loss_dtype(input, target, soft)
    if shift:
        target = shifted(target, ignore_index)
    ids = None if soft else target if target.dim() == 1 else target.reshape(-1)
    prob = _rows(target, vocab) if soft else None
    logits = _rows(input, vocab)
    o = row_options(ignore_index, extras.want(label_smoothing), logit_scale, softcap)
    if fused.direct(logits, ids, prob, weight) and _fusable(reduction, extras, prob):
        formula = Formula(o, label_smoothing, z_loss, reduction)
        if input.requires_grad and torch.is_grad_enabled():
            loss = fused.CrossEntropy.apply(logits, ids, prob, weight, formula)
        else:
            loss = fused.evaluate(logits, ids, prob, weight, formula)
        return loss if loss.dtype == kind else loss.to(kind)
    s = pack(*autograd.row_stats(logits, ids, prob, weight, None, o), ids, soft, vocab, o, weight)
    loss = _finish(s, ids, weight, label_smoothing, extras, reduction).to(kind)
    loss = loss.reshape(batch) if reduction == "none" else loss
    return (loss, _numbers(s, extras.returns, batch)) if extras.returns else loss


def _loss_dtype(input: Tensor, target: Tensor, soft: bool) -> torch.dtype:
    kind = torch.promote_types(input.dtype, target.dtype) if soft else input.dtype
    return torch.promote_types(kind, torch.float32) if _autocast(input) else kind


def _rows(t: Tensor, vocab: int) -> Tensor:
    """[N, V] with the classes last and contiguous."""
    rows = t if t.dim() == 2 else (t.movedim(1, -1) if t.dim() > 1 else t).reshape(-1, vocab)
    return rows if rows.stride(1) == 1 or vocab == 1 else rows.contiguous()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | CompressedTensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    returns: Iterable[str] = (),
    max_extra_bytes: int | None = None,
    grad_weight: Tensor | None = None,
    skip_ignored: bool = False,
) -> Any:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...) without ever storing the logits.

    Signature and shapes of torch 2.13's function, on older torch too; `input` may have any number of leading dims
    ([..., D] with target ids [...] or probabilities [..., C]). With reduction "mean" or "sum" the gradients are made in the
    forward, chunk by chunk (three GEMMs); with "none" the logits are made again in the backward (four). Extra memory
    does not grow with the number of rows. `options`: torch's LinearCrossEntropyOptions; its batch_chunk_size bounds the
    chunk, the rest has no meaning here. Only the gradients that are needed are computed.

    Beyond torch, keyword-only: `z_loss`, `softcap`, `logit_scale`, `shift`, `returns` as in `cross_entropy`;
    `max_extra_bytes` bounds the logits held at a time; `grad_weight`, a float32 buffer of linear_weight's shape, gets dW
    added in the backward instead of linear_weight.grad; `skip_ignored` takes ignored rows out before the GEMMs on a GPU
    too, at the price of one host sync (a CPU always does). `linear_weight` may be a `fastloss.lossless.CompressedTensor`: it
    is frozen, and decoded a chunk of rows at a time.

    Raises RuntimeError and ValueError as torch does; IndexError (CPU) for a class id out of range.
    """
    if not isinstance(linear_weight, Tensor):
        from .lossless import head

        if isinstance(linear_weight, head.CompressedTensor):
            return head.linear_cross_entropy(
                input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
                ignore_index=ignore_index, label_smoothing=label_smoothing, options=options, z_loss=z_loss, softcap=softcap,
                logit_scale=logit_scale, shift=shift, returns=returns, max_extra_bytes=max_extra_bytes,
                grad_weight=grad_weight, skip_ignored=skip_ignored,
            )  # fmt: skip
    _check_tensors(input=input, linear_weight=linear_weight, target=target)
    extras = _extras(z_loss, softcap, logit_scale, shift, returns)
    if _autocast(input) and input.dtype != torch.float64:
        half = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(half), linear_weight.to(half)
        linear_bias = None if linear_bias is None else linear_bias.to(half)
    _check_linear(input, linear_weight, linear_bias)
    many = linear_weight.shape[1:-1]
    batch, vocab = input.shape[:-1], linear_weight.shape[0]
    soft = target.shape == (*batch, vocab, *many)
    if soft and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore = -100 if ignore_index is None else ignore_index
    check_grad_weight(grad_weight, linear_weight)
    limit = extra_bytes(max_extra_bytes)
    if shift and soft:
        raise ValueError("shift needs class ids as target, got probabilities")
    if target.dtype == torch.uint8 and not soft:
        target = target.to(torch.int64)

    def by_torch() -> Any:
        """The composition, on whose logits our cross entropy (or torch's) then works."""
        if not _plain(input, linear_weight, target, linear_bias, weight):
            _refuse(extras, "a tensor has rules of its own (a subclass, or not dense)")
        for name, given in (("grad_weight", grad_weight), ("max_extra_bytes", max_extra_bytes)):
            if given is not None:
                raise ValueError(
                    f"{name} cannot be used here, no kernel takes input {tuple(input.shape)} {input.dtype}, linear_weight "
                    f"{tuple(linear_weight.shape)}, target {tuple(target.shape)} {target.dtype}, reduction {reduction!r}"
                )
        z = F.linear(
            input,
            linear_weight.reshape(math.prod(linear_weight.shape[:-1]), input.shape[-1]),
            None if linear_bias is None else linear_bias.reshape(-1),
        )
        z = z.reshape(*batch, vocab, *many)
        flat = shifted(target, ignore) if shift else target  # while the positions are still apart
        if len(batch) > 1:  # torch's layout has the classes second
            z = z.reshape(batch.numel(), vocab, *many)
            flat = flat.reshape(batch.numel(), vocab, *many) if soft else flat.reshape(batch.numel(), *many)
        out = cross_entropy(
            z, flat, weight, None, ignore, None, reduction, label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, returns=extras.returns,
        )  # fmt: skip
        loss, numbers = out if extras.returns else (out, {})
        loss = loss.reshape((*batch, *many)) if reduction == "none" else loss
        numbers = {name: t.reshape((*batch, *many)) for name, t in numbers.items()}
        return (loss, numbers) if extras.returns else loss

    fits = target.shape == (*batch, *many) and target.dtype == torch.int64
    if soft:
        fits = target.dtype in (input.dtype, torch.float32)
    if not (
        _plain(input, linear_weight, target, linear_bias, weight)
        and not _tracing()
        and input.is_floating_point()
        and input.shape[-1] > 0
        and not _empty(input, extras)
        and vocab
        and not many
        and fits
        and _legal(reduction, label_smoothing)
        and _weight_fits(weight, vocab, input)
        and target.device == input.device
        and (limit or _on_kernels(input, extras))
    ):
        if (
            many
            and fits
            and _legal(reduction, label_smoothing)
            and not extras.returns
            and not shift
            and grad_weight is None
            and input.numel()
            and vocab
        ):
            return _per_position(
                input, linear_weight, target, linear_bias, weight, reduction, ignore, label_smoothing, extras, soft,
                max_extra_bytes,
            )  # fmt: skip
        return by_torch()
    check_head(input, linear_weight, linear_bias)
    kind = _loss_dtype(input, target, soft)
    if shift:
        target = shifted(target, ignore)
    x = input.reshape(-1, input.shape[-1])
    prob = target.reshape(-1, vocab) if soft else None
    ids = None if soft else target.reshape(-1)
    chunk = getattr(options, "batch_chunk_size", None)
    if not limit and chunk:
        limit = chunk * vocab * input.element_size()
    o = row_options(ignore, extras.want(label_smoothing), logit_scale, softcap)
    used = None
    if skip_ignored and ids is not None and x.device.type != "cpu":
        used = torch.nonzero(ids != ignore)[:, 0]
        x, ids = x.index_select(0, used), ids.index_select(0, used)
    if _fusable(reduction, extras, prob) and grad_weight is None:
        formula = Formula(o, label_smoothing, z_loss, reduction, limit)
        needs = _needs(x, linear_weight, linear_bias)
        if needs:
            loss = fused.LinearCrossEntropy.apply(x, linear_weight, linear_bias, ids, prob, weight, formula, needs)
        else:
            loss = fused.evaluate_linear(x, linear_weight, linear_bias, ids, prob, weight, formula)
        return loss.to(kind)
    raw = autograd.linear_row_stats(x, linear_weight, linear_bias, ids, prob, weight, None, o, limit, grad_weight)
    s = pack(*raw, ids, soft, vocab, o, weight)
    loss = _finish(s, ids, weight, label_smoothing, extras, reduction).to(kind)
    numbers = {name: getattr(s, name) for name in extras.returns}
    if used is not None and reduction == "none":
        loss = loss.new_zeros(batch.numel()).index_copy(0, used, loss)
    if used is not None:
        numbers = {k: t.new_zeros(batch.numel()).index_copy(0, used, t) for k, t in numbers.items()}
    loss = loss.reshape(batch) if reduction == "none" else loss
    return (loss, {k: t.reshape(batch) for k, t in numbers.items()}) if extras.returns else loss


def _needs(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The gradients that a backward will ask for."""
    if not torch.is_grad_enabled():
        return 0
    needs = Needs.INPUT.value if x.requires_grad else 0
    needs |= Needs.WEIGHT.value if weight.requires_grad else 0
    return needs | (Needs.BIAS.value if bias is not None and bias.requires_grad else 0)


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dim() < 1:
        raise RuntimeError(f"expected input with at least 1 dimension, [..., D], got {tuple(input.shape)}")
    if weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {weight.dim()}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    if weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"a K-dimensional loss, linear_weight {tuple(weight.shape)}, needs input (N, {input.shape[-1]}), "
            f"got {tuple(input.shape)}"
        )


def _per_position(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    reduction: str, ignore: int, smoothing: float, extras: _Extras, soft: bool, max_extra_bytes: int | None,
) -> Tensor:  # fmt: skip
    """A K-dimensional head (C, d_1..d_K, D) is one head a position: their losses, one after another."""
    vocab, many = linear_weight.shape[0], linear_weight.shape[1:-1]
    positions = math.prod(many)
    heads = linear_weight.reshape(vocab, positions, -1)
    biases = None if linear_bias is None else linear_bias.reshape(vocab, positions)
    targets = target.reshape(-1, vocab, positions) if soft else target.reshape(-1, positions)
    wide = input.to(torch.promote_types(input.dtype, torch.float32))  # gradients of the positions add up in float32
    each = [
        linear_cross_entropy(
            wide.to(input.dtype), heads[:, k], targets[..., k].contiguous(),
            linear_bias=None if biases is None else biases[:, k].contiguous(), weight=weight,
            reduction="none" if reduction == "none" else "sum", ignore_index=None if soft else ignore,
            label_smoothing=smoothing, z_loss=extras.z_loss, softcap=extras.softcap, logit_scale=extras.logit_scale,
            max_extra_bytes=max_extra_bytes,
        )
        for k in range(positions)
    ]  # fmt: skip
    if reduction == "none":
        return torch.stack(each, -1).reshape(-1, *many)
    total = torch.stack(each).sum()
    if reduction == "sum":
        return total
    ids = None if soft else target.reshape(-1)
    count = denominator(ids, input.shape[0] * positions, weight, ignore, reduction, total.detach().to(wide.dtype))
    some = count != 0  # of no rows torch's mean is NaN, its gradient 0
    return torch.where(some, total / torch.where(some, count, 1.0), torch.nan).to(total.dtype)


def __getattr__(name: str) -> Any:
    """Whatever else torch.nn.functional has, so that swapping the import is always safe."""
    return getattr(F, name)
