"""Drop-in losses that are a sum over elements: binary_cross_entropy_with_logits and kl_div.

One read of every operand gives the loss and, for the reductions that make a number of it, the gradient of the input for
an upstream gradient of 1 (docs/design.md, "A gradient made in the forward"). What no kernel takes goes to PyTorch.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled, registry
from .autograd import _differentiate, batched, forward_mode_active, functorch_active, keeps_graph
from .contract import Pointwise
from .fused import direct
from .passed_through import explained


class Formula(NamedTuple):
    """What a pointwise loss takes besides tensors."""

    kind: int
    share: float  # of the sum, what the loss is
    reduce: bool


#: Elements below which torch is faster on a CPU, three times as many where nothing is reduced: a forward and backward of
#: ours costs 75 us beside the kernels, most of it Python, and one of torch's 40 us. Measured with one thread: reduced,
#: binary_cross_entropy_with_logits breaks even at 16384 (1.05 of torch's time in float32, 0.87 in bfloat16) and kl_div at
#: 8192; not reduced, 1.5 at 16384 and 0.8 at 64000. A backend that is named runs whatever the size.
SMALL = 16384

#: Where some compiled or Triton kernel can run; elsewhere PyTorch's own function is as good as ours.
_HAS_KERNELS = {
    "cpu": compiled._C is not None and compiled._C.best_isa() > 0,
    "cuda": bool(getattr(compiled._C, "cuda", False)) or importlib.util.find_spec("triton") is not None,
}


def _worth_it(input: Tensor, reduction: str) -> bool:
    """Whether a kernel of ours beats torch's function."""
    if registry.forced() is not None:
        return True
    kind = input.device.type
    small = SMALL if reduction != "none" else 3 * SMALL
    return _HAS_KERNELS.get(kind, False) and (kind != "cpu" or input.numel() >= small)


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device type without autocast
        return False


def _loss_dtype(input: Tensor, labels: Tensor) -> torch.dtype:
    return torch.float32 if _autocast(input.device.type) else torch.promote_types(input.dtype, labels.dtype)


def _takes(reduction: str, input: Any, labels: Any, weight: Any = None, pos_weight: Any = None) -> bool:
    """Whether a kernel takes these tensors, and is worth its call."""
    tensors = (input, labels, weight, pos_weight)
    if torch.compiler.is_compiling() or not isinstance(input, Tensor) or not isinstance(labels, Tensor):
        return False
    if not direct(*tensors) or functorch_active() or forward_mode_active():
        return False
    device, dtype = input.device, input.dtype
    if dtype not in compiled.DTYPES or labels.shape != input.shape or not input.numel():
        return False
    if not _worth_it(input, reduction):
        return False
    trained = torch.is_grad_enabled()  # a gradient of anything but the input is left to PyTorch
    for t in tensors:
        if t is not None and (t.layout != torch.strided or t.device != device or t.is_complex()):
            return False
    for t in tensors[1:]:
        if t is not None and (t.dtype not in (dtype, torch.float32) or (trained and t.requires_grad)):
            return False
    return True


def _repeated(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """`weight` as kernels read it, element i at i modulo its size: its leading 1s dropped, or written out in full."""
    if weight is None:
        return None
    shape, whole = list(weight.shape), list(input.shape)
    while shape and shape[0] == 1:
        del shape[0]
    trailing = shape == whole[len(whole) - len(shape) :]
    return weight.reshape(shape).contiguous() if trailing else weight.expand(whole).contiguous()


def _broadcasts(weight: Tensor | None, input: Tensor) -> bool:
    """Whether the weight has at most the input's shape; torch's function has what is larger, or an error."""
    if weight is None:
        return True
    ours, whole = weight.shape, input.shape
    return len(ours) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(ours), reversed(whole), strict=False))


def _composition(
    input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, f: Formula
) -> tuple[Tensor]:
    """The same loss by differentiable PyTorch ops, for second derivatives."""
    x, t, w, p = (None if a is None else a.float() for a in (input, labels, weight, pos_weight))
    if f.kind == Pointwise.BCE_WITH_LOGITS:
        values = F.binary_cross_entropy_with_logits(x, t, w, reduction="none", pos_weight=p)  # type: ignore[arg-type]
    else:
        values = F.kl_div(x, t, reduction="none", log_target=f.kind == Pointwise.KL_DIV_LOG_TARGET)  # type: ignore[arg-type]
    return (values.sum() * f.share if f.reduce else values,)


class PointwiseLoss(torch.autograd.Function):
    """The loss as a number, its gradient made on the way; or, not reduced, a value for each element."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, f: Formula,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        loss, dinput = registry.run("pointwise_loss", input, labels, weight, pos_weight, *f, f.reduce)
        ctx.save_for_backward(input, labels, weight, pos_weight, dinput)
        ctx.formula = f
        return loss if loss.dtype == dtype else loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, labels, weight, pos_weight, dinput = ctx.saved_tensors
        f: Formula = ctx.formula
        nothing = (None,) * 5
        if torch.is_grad_enabled() or batched(g):
            (d,) = _differentiate(lambda x: _composition(x, labels, weight, pos_weight, f), (input,), (g,))
            return d, *nothing
        operands = (input, labels, weight, pos_weight, f.kind, f.share)
        if not f.reduce:
            one = g[(0,) * g.dim()] if not any(g.stride()) else g.contiguous()  # expanded from a sum: one number
            return registry.run("pointwise_loss_backward", one, *operands), *nothing
        keep = keeps_graph()
        if g.device.type == "cpu":
            if g.item() != 1:  # made again rather than scaled, which in 16 bits would round twice
                return registry.run("pointwise_loss_backward", g, *operands), *nothing
            return dinput.clone() if keep else dinput, *nothing
        d = dinput.clone() if keep else dinput  # whether g is 1 is known to the device alone
        registry.run("pointwise_loss_backward_unless_one_", d, g, *operands)
        return d, *nothing


def _run(input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, f: Formula) -> Tensor:
    dtype = _loss_dtype(input, labels)
    operands = (input.contiguous(), labels.contiguous(), _repeated(weight, input), _repeated(pos_weight, input))
    if input.requires_grad and torch.is_grad_enabled():
        return PointwiseLoss.apply(*operands, f, dtype)
    loss, _ = registry.run("pointwise_loss", *operands, *f, False)
    return loss if loss.dtype == dtype else loss.to(dtype)


def _share(input: Tensor, reduction: str) -> float:
    """What the sum is multiplied by."""
    if reduction == "mean":
        return 1 / input.numel()
    return 1 / input.shape[0] if reduction == "batchmean" and input.dim() else 1.0


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.binary_cross_entropy_with_logits, with the same arguments, shapes, dtypes and results.

    Of logits x, targets t in [0, 1], weights w and weights p of the positive class, w (1 - t) x + w (1 + (p - 1) t)
    log(1 + e^-x) for each element, in a form that neither overflows nor cancels; `reduction` "mean", "sum" or "none".
    Input and target of any shape, the same; weights broadcast to it. float32, float16, bfloat16 and float32 targets of
    16-bit logits run on fastloss kernels, and the gradient of the input is made in the same pass as the loss. The rest
    goes to PyTorch: float64, a gradient of target or weights, torch.compile, torch.func, forward-mode AD, `size_average`
    and `reduce`, and on a CPU what is small (`fastloss.pointwise.SMALL`).

    Raises what torch raises: ValueError where target and input differ in shape.
    """
    if (
        size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none")
        and _takes(reduction, input, target, weight, pos_weight)
        and _broadcasts(weight, input)
        and _broadcasts(pos_weight, input)
    ):
        f = Formula(Pointwise.BCE_WITH_LOGITS.value, _share(input, reduction), reduction != "none")
        return _run(input, target, weight, pos_weight, f)
    return explained(
        lambda: F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight),
        "binary_cross_entropy_with_logits", input=input, target=target, weight=weight, pos_weight=pos_weight,
    )  # fmt: skip


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """torch.nn.functional.kl_div, with the same arguments, shapes, dtypes and results.

    Of log-probabilities x and probabilities t, t (log t - x) for each element and 0 at t = 0; with `log_target` of
    log-probabilities t, e^t (t - x). `reduction` "batchmean", which is the divergence, divides the sum by the size of the
    first dimension; "mean" divides it by the number of elements and warns, as in torch; "sum"; "none". What runs on
    fastloss kernels is what `binary_cross_entropy_with_logits` says; input and target that broadcast go to PyTorch.

    Raises what torch raises: RuntimeError where the shapes do not broadcast.
    """
    if (
        size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none", "batchmean")
        and _takes(reduction, input, target)
    ):
        if reduction == "mean":
            warnings.warn(
                'kl_div: reduction "mean" divides by the number of elements; the divergence is "batchmean", which '
                "divides by the size of the first dimension.",
                stacklevel=2,
            )
        kind = Pointwise.KL_DIV_LOG_TARGET if log_target else Pointwise.KL_DIV
        return _run(input, target, None, None, Formula(kind.value, _share(input, reduction), reduction != "none"))
    return explained(
        lambda: F.kl_div(input, target, size_average, reduce, reduction, log_target),
        "kl_div", input=input, target=target,
    )  # fmt: skip
