"""A convolution of one-bit weights and one-bit inputs for training: a product of packed bits, saved are bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs.arguments import autocast_dtype
from .binarize import _statistics, binarize
from .binary_linear import SAVES
from .contract import Surrogate
from .ops import wide
from .patches import PADDING_MODES, Geometry
from .sign_conv2d import SignConv2d
from .surrogates import SurrogateFunction, surrogate_of


def pair(name: str, value: int | tuple[int, ...], least: int) -> tuple[int, int]:
    """One number, or two, as two; ValueError below `least`."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{name} must be one integer or two, at least {least}, got {value!r}")
    return both[0], both[1]


def padding_of(
    padding: str | int | tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of torch's `padding`: "valid", "same", one number or two."""
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f'padding must be "valid", "same" or integers, got {padding!r}')
        if padding == "same" and stride != (1, 1):
            raise ValueError(f'padding="same" takes a stride of 1, got {stride}')
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2
    height, width = pair("padding", padding, 0)
    return width, width, height, height


def geometry_of(
    shape: torch.Size, weight_shape: tuple[int, ...], stride: int | tuple[int, ...], padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...], groups: int, padding_mode: str,
) -> Geometry:  # fmt: skip
    """What convolves an image [N, C, H, W] with a weight [O, C / groups, kh, kw]; ValueError for what does not fit."""
    if len(weight_shape) != 4 or not all(weight_shape):
        raise ValueError(f"weight must be [O, C / groups, kh, kw], none of them 0, got {list(weight_shape)}")
    outputs, channels, *kernel = weight_shape
    if not isinstance(groups, int) or groups < 1 or outputs % groups:
        raise ValueError(f"groups must divide the {outputs} outputs, got {groups}")
    if len(shape) != 4 or shape[1] != channels * groups:
        raise ValueError(f"x must be [N, {channels * groups}, H, W] or the same without N, got {list(shape)}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    steps, spread = pair("stride", stride, 1), pair("dilation", dilation, 1)
    size = (kernel[0], kernel[1])
    around = padding_of(padding, size, steps, spread)
    geometry = Geometry(shape[2], shape[3], channels, groups, size, steps, spread, around, padding_mode)
    if min(geometry.output) < 1:
        raise ValueError(f"a kernel of {size}, dilation {spread}, does not fit in a padded image of {geometry.padded}")
    most = {"reflect": 1, "circular": 0}.get(padding_mode)
    if most is not None and (max(around[:2]) > shape[3] - most or max(around[2:]) > shape[2] - most):
        raise ValueError(f"padding_mode={padding_mode!r} takes less padding than {around} for {shape[2]} x {shape[3]}")
    if padding_mode == "replicate" and any(around) and not (shape[2] and shape[3]):
        raise ValueError("padding_mode='replicate' has no pixel to repeat in an empty image")
    return geometry


def binary_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, *,
    padding_mode: str = "zeros", input_surrogate: str | SurrogateFunction = "clip",
    weight_surrogate: str | SurrogateFunction = "clip", scale: str | Tensor | None = "row", center: bool = False,
    input_shift: Tensor | None = None, detach: bool = True, save: str = "auto",
) -> Tensor:  # fmt: skip
    """y = scale_o conv2d(sign(x - input_shift), sign(W - c)) + bias_o by packed bits, trained through surrogates.

    Args:
        x: [N, C, H, W] or [C, H, W]; float32, float16, bfloat16 (float64 by PyTorch operations). Channels last in memory
            is what is read, and what comes back.
        weight: latent weights [O, C / groups, kh, kw]; bias [O] or None.
        stride, padding, dilation, groups: as of torch.nn.functional.conv2d; padding also "same" and "valid".
        padding_mode: "zeros": exactly zero, as torch pads: one bit has no zero, so the padding is taken as -1 and the
            sum of the signs under it is added; "ones": +1, a bit like others (the "same_one" padding of Larq Compute
            Engine); "reflect", "replicate", "circular".
        input_surrogate, weight_surrogate, scale, center, detach: as of `binary_linear`; a row is what makes one output.
        input_shift: 1 or C learned numbers (ReActNet's RSign), or None.
        save: as of `binary_linear`.

    The sums are exact integers. Saved are two bits an element of x and one of W with "clip"; there is no second
    derivative (RuntimeError). Raises ValueError and TypeError.

    "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"; other operators: "BiBench:
    Benchmarking and Analyzing Network Binarization".
    """
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor) or not given.is_floating_point():
            what = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a floating tensor, got {what}")
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(SAVES)}, got {save!r}")
    if x.dim() == 3:
        return binary_conv2d(
            x[None], weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode, save=save, scale=scale,
            input_surrogate=input_surrogate, weight_surrogate=weight_surrogate, center=center, detach=detach,
            input_shift=input_shift,
        )[0]  # fmt: skip
    geometry = geometry_of(x.shape, tuple(weight.shape), stride, padding, dilation, groups, padding_mode)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if isinstance(scale, Tensor) and scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"scale must hold 1 or {weight.shape[0]} numbers, got {list(scale.shape)}")
    factor, shift, _ = _statistics(weight, scale, center, None, 0, detach)
    # Rows as long as can be: a mask has whole rows of 64 bytes.
    weight_signs = binarize(weight.flatten(1), weight_surrogate, shift=shift).reshape(weight.shape)  # type: ignore[union-attr]
    function = surrogate_of(input_surrogate)
    leveled = save == "auto" and function.kind not in (Surrogate.CLIP, Surrogate.IDENTITY, Surrogate.BIPER)
    u = x.permute(0, 2, 3, 1)
    if input_shift is not None:
        if input_shift.numel() not in (1, x.shape[1]):
            raise ValueError(f"input_shift must hold 1 or {x.shape[1]} numbers, got {list(input_shift.shape)}")
        u = u.to(wide(u)) - input_shift.reshape(-1)
    signs = binarize(u.flatten(1), function, save="u8" if leveled else "auto").reshape(u.shape)  # type: ignore[union-attr]
    if factor is not None:
        factor = factor.reshape(-1).expand(weight.shape[0])
    return SignConv2d.apply(signs, weight_signs, factor, bias, geometry, autocast_dtype(x))
