"""What binary layers share: their options, the trained numbers beside the latent weight, and how inputs become bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import _statistics, binarize, mean_magnitude
from ..binary_linear import SAVES
from ..bit_tensor import BitTensor
from ..contract import Surrogate
from ..ops import wide
from ..surrogates import SurrogateFunction, surrogate_of

SCALES = (None, "mean", "row", "learned")


class BinaryOptions:
    """The words by which `BinaryLinear` and `BinaryConv2d` are told how to binarise.

    Args:
        input_surrogate, weight_surrogate: as of `binarize`: "clip", "identity", "approx", "reste", "biper", "swish",
            "fda", or one of `fastloss.quant.surrogates` with its own numbers. May be set again during training (ReSTE's
            power).
        scale: what an output is times: None (1); "mean" |W| of all, or "row": of its own weights; "learned": a
            parameter, first the mean of its row ("XNOR-Net++"; BiViT's learned scale).
        center: the weights less the mean of their row, or of all with scale="mean" (XNOR-Net, BiViT).
        input_shift: a learned shift of each input channel (ReActNet's RSign), first 0.
        input_scale: an output is also times mean |x| of its input row, or of the image (XNOR-Net's K), a constant in
            the backward.
        detach: whether scale and centre made of W are constants in the backward (XNOR-Net, BiViT) or not (ReSTE).
        save: "auto" or "exact": what the slope of the input's surrogate is made of, see `binary_linear`.
    """


class BinaryLayer(nn.Module):
    """Base of the binary layers: weight [out, in, ...] latent, and the options of `BinaryOptions`."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    input_shift: Tensor | None

    def _options(
        self, shape: tuple[int, ...], inputs: int, bias: bool, factory: dict[str, Any], *,
        input_surrogate: str | SurrogateFunction = "clip", weight_surrogate: str | SurrogateFunction = "clip",
        scale: str | None = "row", center: bool = False, input_shift: bool = False, input_scale: bool = False,
        detach: bool = True, save: str = "auto",
    ) -> None:  # fmt: skip
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale!r}")
        if save not in SAVES:
            raise ValueError(f"save must be one of {', '.join(SAVES)}, got {save!r}")
        self.input_surrogate, self.weight_surrogate = surrogate_of(input_surrogate), surrogate_of(weight_surrogate)
        self.scaling, self.center, self.input_scale, self.detach, self.save = scale, center, input_scale, detach, save
        #: BiPer's first stage: the weight is sin(w W) itself, not its sign.
        self.real_weight = False
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **factory)) if bias else None)
        self.register_parameter("scale", nn.Parameter(torch.empty(shape[0], **factory)) if scale == "learned" else None)
        self.register_parameter("input_shift", nn.Parameter(torch.empty(inputs, **factory)) if input_shift else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as torch.nn.Linear's; a learned scale as `reset_scale`; the shift 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)
        if self.input_shift is not None:
            nn.init.zeros_(self.input_shift)
        self.reset_scale()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """A learned scale becomes the mean |W - c| of its row, as it is after a weight has been loaded that had none."""
        if self.scale is not None:
            center = self.weight.flatten(1).mean(1) if self.center else None
            self.scale.copy_(mean_magnitude(self.weight, 0, center))

    def _scale(self) -> str | Tensor | None:
        return self.scale if self.scaling == "learned" else self.scaling

    def _words(self) -> dict[str, Any]:
        """The keyword arguments of `binary_linear` and `binary_conv2d`."""
        return {
            "input_surrogate": self.input_surrogate, "weight_surrogate": self.weight_surrogate, "scale": self._scale(),
            "center": self.center, "input_shift": self.input_shift, "detach": self.detach, "save": self.save,
        }  # fmt: skip

    def _sine_weight(self) -> Tensor:
        """scale sin(w (W - c)): what BiPer trains in its first stage."""
        if self.weight_surrogate.kind != Surrogate.BIPER:
            raise ValueError(
                f"real_weight is a stage of weight_surrogate biper, got {self.weight_surrogate.kind.name.lower()}"
            )
        scale, shift, _ = _statistics(self.weight, self._scale(), self.center, None, 0, self.detach)
        beside = (-1, *[1] * (self.weight.dim() - 1))
        w = self.weight if shift is None else self.weight - shift.reshape(beside)
        w = torch.sin(self.weight_surrogate.p0 * w)
        return (w if scale is None else w * scale.reshape(beside)).to(self.weight.dtype)

    def packed_weight(self) -> BitTensor:
        """The signs of the weight [out, everything else] with the scale, no gradient."""
        if self.real_weight:
            raise ValueError("real_weight is True: the weights of BiPer's first stage are not bits")
        with torch.no_grad():
            w = self.weight.flatten(1)
            bits = binarize(w, self.weight_surrogate, scale=self._scale(), center=self.center, packed=True)
        assert isinstance(bits, BitTensor)
        scale = bits.scale
        return bits if scale is None else bits._replace(scale=scale.expand(w.shape[0], 1).contiguous())

    def _option_words(self) -> str:
        words = [f"input_surrogate={self.input_surrogate.kind.name.lower()}"]
        words.append(f"weight_surrogate={self.weight_surrogate.kind.name.lower()}, scale={self.scaling!r}")
        words += [name for name in ("center", "input_scale", "real_weight") if getattr(self, name)]
        return ", ".join(words + (["input_shift"] if self.input_shift is not None else []))


def decided(x: Tensor, shift: Tensor | None, surrogate: SurrogateFunction) -> Tensor:
    """What has the sign that `binarize` gives to x [..., C]; shift [C]."""
    if shift is None and surrogate.kind != Surrogate.BIPER:
        return x
    x = x.to(wide(x))
    u = x if shift is None else x - shift
    return torch.sin(surrogate.p0 * u) if surrogate.kind == Surrogate.BIPER else u


def finished(y: Tensor, x: Tensor, dim: int | tuple[int, ...], bias: Tensor | None) -> Tensor:
    """y mean |x| + bias: XNOR-Net's scale of the inputs, the mean over `dim` of x, without gradient."""
    y = y * x.detach().to(wide(x)).abs().mean(dim, keepdim=True).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype).reshape(-1, *[1] * (0 if dim == -1 else 2))
