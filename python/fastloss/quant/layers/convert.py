"""Whole models: layers of torch.nn replaced by layers of bits, and those by their packed form."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..surrogates import SurrogateFunction, surrogate_of
from .binary import BinaryLayer
from .binary_conv2d import BinaryConv2d
from .binary_linear import BinaryLinear

Skip = Iterable[str] | Callable[[str, nn.Module], bool]
#: A class with `from_float`, or a function of the layer that is replaced.
Maker = Callable[..., nn.Module]
_Test = Callable[[str, nn.Module], bool]


def _skips(skip: Skip) -> _Test:
    if not isinstance(skip, Iterable):
        return skip
    patterns = [skip] if isinstance(skip, str) else list(skip)
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _replace(model: nn.Module, of: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Every module for which `of` has another one replaced in place, once where it is shared."""
    found = [(module, of(name, module)) for name, module in model.named_modules()]
    made = {id(module): new for module, new in found if new is not None}
    if id(model) in made:
        return made[id(model)]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in made:
                setattr(module, name, made[id(child)])
    return model


def _made(maker: Maker, options: dict[str, Any] | None, layer: nn.Module) -> nn.Module:
    return getattr(maker, "from_float", maker)(layer, **(options or {}))


def convert(
    model: nn.Module, linear: Maker | None = BinaryLinear, conv2d: Maker | None = None, *, skip: Skip = (),
    linear_options: dict[str, Any] | None = None, conv2d_options: dict[str, Any] | None = None, inplace: bool = False,
) -> nn.Module:  # fmt: skip
    """The model with its torch.nn.Linear and torch.nn.Conv2d replaced by layers that start from the same weights.

    Args:
        model: any module; of subclasses of Linear and Conv2d nothing is known, they stay.
        linear, conv2d: a layer of this package, or a function of the layer that is replaced; None: these stay.
        skip: names that stay, as of `named_modules` and with the wildcards of fnmatch ("head", "*.out_proj"), or a
            function of name and module.
        linear_options, conv2d_options: keywords for the new layers.
        inplace: replace them in `model` itself, not in a copy.

    Raises TypeError and ValueError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    skips = _skips(skip)

    def of(name: str, module: nn.Module) -> nn.Module | None:
        for kind, maker, options in ((nn.Linear, linear, linear_options), (nn.Conv2d, conv2d, conv2d_options)):
            if type(module) is kind and maker is not None and not skips(name, module):
                return _made(maker, options, module)
        return None

    return _replace(model if inplace else copy.deepcopy(model), of)


def binarize_model(
    model: nn.Module, *, skip: Skip = (), keep_ends: bool = True, inplace: bool = False, **options: Any
) -> nn.Module:
    """`convert` to `BinaryLinear` and `BinaryConv2d`.

    Args:
        keep_ends: the first and the last of the layers in `named_modules` stay as they are, as is usual: they cost
            little and lose most.
        options: keywords of `BinaryOptions`. The others: as of `convert`.
    """
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    ends = {names[0], names[-1]} if keep_ends and names else set()
    skips = _skips(skip)
    return convert(
        model, BinaryLinear, BinaryConv2d, skip=lambda name, module: name in ends or skips(name, module),
        linear_options=options, conv2d_options=options, inplace=inplace,
    )  # fmt: skip


def pack_model(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model for inference: every layer that has `pack()` replaced by what that gives, in eval mode.

    A copy of `model`, unless inplace. What has no `pack()` stays.
    """

    def of(_: str, module: nn.Module) -> nn.Module | None:
        pack = getattr(module, "pack", None)
        return pack() if callable(pack) else None

    return _replace(model if inplace else copy.deepcopy(model), of).eval()


def model_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    return sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


def set_surrogate(
    model: nn.Module, *, inputs: str | SurrogateFunction | None = None, weights: str | SurrogateFunction | None = None
) -> None:
    """Other surrogates for every binary layer of a model, such as ReSTE's next power; None: as they are."""
    for module in model.modules():
        if isinstance(module, BinaryLayer):
            module.input_surrogate = module.input_surrogate if inputs is None else surrogate_of(inputs)
            module.weight_surrogate = module.weight_surrogate if weights is None else surrogate_of(weights)
