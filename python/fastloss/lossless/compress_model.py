"""Whole models: the weights of nn.Linear and nn.Embedding compressed where they stand, and back."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compress import CODECS, LAYOUTS, TIERS, _choose, compress
from .compressed_weight import CompressedWeight
from .contract import DTYPES, NUMBERS, P7_NUMBERS, Codec, has_tiles
from .layers import CompressedEmbedding, CompressedLayer, CompressedLinear, dense_layer, in_place_of
from .linear import check_mode

TorchLayer = nn.Linear | nn.Embedding
#: Names (as of `named_modules`, with the wildcards of fnmatch), or a function of name and module.
Names = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    kind: str  # its class before
    shape: tuple[int, ...]
    before: int  # bytes of the weight; 0 where it is tied to one that is listed above
    after: int
    why_not: str | None = None  # None: it was compressed


@dataclass
class ModelReport:
    """What `compress_model` did; print it."""

    model: nn.Module
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def compressed(self) -> list[LayerReport]:
        """The layers that were compressed."""
        return [layer for layer in self.layers if layer.why_not is None]

    @property
    def skipped(self) -> dict[str, str]:
        """The reason why, by name, for each Linear and Embedding that was left alone."""
        return {layer.name: layer.why_not for layer in self.layers if layer.why_not is not None}

    @property
    def before(self) -> int:
        """Bytes of all listed weights before."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Bytes of all listed weights after."""
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            f"{x.name or '(the model)'}: {x.kind} {list(x.shape)}, {x.before} -> {x.after} bytes"
            + (f" ({x.why_not})" if x.why_not else "")
            for x in self.layers
        ]
        share = f", {100 * self.after / self.before:.1f} %" if self.before else ""
        return "\n".join([*rows, f"{len(self.compressed)} layers: {self.before} -> {self.after} bytes{share}"])


def compress_model(
    model: nn.Module, include: Names | None = None, exclude: Names | None = None, codec: str = "auto",
    tier: str = "fused", mode: str = "exact", min_bytes: int = 65536, inplace: bool = True, verify: bool = True,
    layout: str = "rows", offload: bool = False,
) -> ModelReport:  # fmt: skip
    """Replace nn.Linear and nn.Embedding by `CompressedLinear` and `CompressedEmbedding` of the same numbers.

    Tied weights stay tied: they share one blob. The weights are frozen from here on; biases are the same Parameters.

    Args:
        model: any module, a transformers model too.
        include, exclude: which layers, by name with wildcards ("*.mlp.*") or by a function of name and module; exclude wins.
        codec, tier: as of `compress`.
        mode: "exact", "auto" or "fused", of the linear layers: see `compressed_linear`.
        min_bytes: smaller weights stay.
        inplace: replace the layers in `model`, else in a copy: the report's `model`.
        verify: decode every weight and compare it before the dense one is let go.
        layout: "rows", or "tiles" for linear weights that have it and are not tied to an embedding.
        offload: keep compressed weights in CPU memory: see `CompressedWeight`.

    Returns:
        What became of every layer and why some were left alone: subclasses with a forward of their own, hooks,
        parametrizations, weights that something else holds too or that would not be smaller.

    Raises TypeError and ValueError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, accepted in (
        ("codec", codec, ("auto", *CODECS)),
        ("tier", tier, TIERS),
        ("layout", layout, LAYOUTS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    check_mode(mode)
    model = model if inplace else copy.deepcopy(model)
    if inplace and isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"the model is itself a {type(model).__name__}: pass inplace=False and take the report's model"
        )
    report = ModelReport(model)
    chosen, places = _choice(include, exclude), _places(model)
    for owners, others in _weights(model):
        whys = (_why_not(name, layer, chosen, min_bytes, codec) for name, layer in owners)
        reason = others or next(filter(None, whys), None)
        held = None if reason else _compressed([layer for _, layer in owners], codec, tier, layout, offload, verify)
        if held is None and reason is None:
            reason = "it would not be smaller"
        for k, (name, layer) in enumerate(owners):
            weight = layer._parameters.get("weight")
            if weight is None or nn.parameter.is_lazy(weight):
                before, shape = 0, tuple[int, ...]()
            else:
                before, shape = 0 if k else weight.nbytes, tuple(weight.shape)
            after = before if held is None or k else held.header.bytes
            report.layers.append(LayerReport(name, type(layer).__name__, shape, before, after, reason))
            if held is not None:
                report.model = _replaced(report.model, places, layer, _layer(layer, held, mode))
    return report


def decompress_model(model: nn.Module, inplace: bool = True) -> nn.Module:
    """The inverse: `CompressedLinear` and `CompressedEmbedding` replaced by nn.Linear and nn.Embedding of the same bits.

    Tied weights stay tied. Weights require a gradient where they did before they were compressed. With inplace=False a
    copy of the model is returned. Raises TypeError where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = model if inplace else copy.deepcopy(model)
    dense, places = dict[int, nn.Parameter](), _places(model)
    for layer in [m for m in model.modules() if isinstance(m, CompressedLayer)]:
        held = layer.compressed
        if id(held) not in dense:
            dense[id(held)] = nn.Parameter(held.tensor.decompress(), requires_grad=held.trained)
        model = _replaced(model, places, layer, dense_layer(layer, dense[id(held)]))
    return model


# ---------------------------------------------------------------------------------------------- which layers


def _matches(names: Names) -> Callable[[str, nn.Module], bool]:
    if callable(names):
        return names
    patterns = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"include and exclude are names, or a function of name and module, got {wrong[0]!r}")
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _choice(include: Names | None, exclude: Names | None) -> Callable[[str, nn.Module], str | None]:
    """Why a layer is not among those chosen, or None."""
    included = None if include is None else _matches(include)
    excluded = None if exclude is None else _matches(exclude)

    def why_not(name: str, layer: nn.Module) -> str | None:
        if included is not None and not included(name, layer):
            return "it is not included"
        return "it is excluded" if excluded is not None and excluded(name, layer) else None

    return why_not


def _memory(weight: Tensor) -> object:
    """What two parameters that are one memory have in common."""
    plain = type(weight) is nn.Parameter and weight.layout == torch.strided and not weight.is_meta
    if not plain or not weight.numel():
        return id(weight)
    return weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _weights(model: nn.Module) -> list[tuple[list[tuple[str, TorchLayer]], str | None]]:
    """For every weight the layers that hold it, and why it must stay where something else holds it too."""
    layers: dict[object, list[tuple[str, TorchLayer]]] = {}
    others: dict[object, str] = {}
    for name, module in model.named_modules():
        ours = module if isinstance(module, TorchLayer) else None
        if ours is not None and ours._parameters.get("weight") is None:
            layers[id(ours)] = [(name, ours)]
        for part, parameter in module._parameters.items():
            if parameter is None:
                continue
            if ours is not None and part == "weight":
                layers.setdefault(_memory(parameter), []).append((name, ours))
            else:
                others[_memory(parameter)] = f"its weight is {name}.{part} too, which stays"
    return [(owners, others.get(key)) for key, owners in layers.items()]


def _why_not(
    name: str, layer: nn.Module, chosen: Callable[[str, nn.Module], str | None], min_bytes: int, codec: str
) -> str | None:
    """Why a layer has to stay as it is, or None."""
    if reason := chosen(name, layer):
        return reason
    base = nn.Linear if isinstance(layer, nn.Linear) else nn.Embedding
    if parametrize.is_parametrized(layer):
        return "it is parametrized"
    if type(layer).forward is not base.forward or "forward" in layer.__dict__:
        return "it has a forward of its own"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is made of other tensors (pruning, weight norm)"
    if layer._buffers or layer._modules or set(layer._parameters) - {"weight", "bias"}:
        return "it holds more than a weight and a bias"
    if any(getattr(layer, hooks) for hooks in _HOOKS) or weight._backward_hooks:
        return "it has hooks"
    if type(weight) is not nn.Parameter or weight.is_meta or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} on {weight.device}"
    if weight.dtype not in DTYPES:
        return f"{weight.dtype} cannot be stored"
    if codec == "p7" and NUMBERS.get(weight.dtype) not in P7_NUMBERS:
        return f"codec p7 takes bf16, fp16 and fp32, not {weight.dtype}"
    if weight.nbytes < min_bytes:
        return f"its weight has fewer than {min_bytes} bytes"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm rewrites its rows"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# ---------------------------------------------------------------------------------------------- replacing


def _compressed(
    layers: list[TorchLayer], codec: str, tier: str, layout: str, offload: bool, verify: bool
) -> CompressedWeight | None:
    """The weight that these layers share, or None where compressing it does not make it smaller."""
    weight = layers[0].weight
    tiles = (
        layout == "tiles"
        and has_tiles(weight.shape[0], weight.shape[1])
        and all(isinstance(m, nn.Linear) for m in layers)
    )
    if tiles and _choose(weight.dtype, codec, tier) != Codec.P7:
        tiles = False
    found = compress(weight.detach(), codec, tier, "tiles" if tiles else "rows", verify)
    if found.codec == Codec.RAW or found.nbytes >= weight.nbytes:
        return None
    return CompressedWeight(found, offload, weight.requires_grad)


def _layer(layer: TorchLayer, held: CompressedWeight, mode: str) -> CompressedLayer:
    new: CompressedLayer
    if isinstance(layer, nn.Embedding):
        new = CompressedEmbedding(held, layer.padding_idx)
    else:
        new = CompressedLinear(held, layer.bias, mode)
    in_place_of(layer, new)
    return new


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where every module stands: (parent, name there), by its id."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            places.setdefault(id(child), []).append((module, name))
    return places


def _replaced(
    model: nn.Module, places: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module
) -> nn.Module:
    """The model with `old` replaced in place wherever it stands."""
    for parent, name in places.get(id(old), ()):
        setattr(parent, name, new)
    return new if model is old else model
