"""`CompressedLinear` and `CompressedEmbedding`: torch's layers over a frozen weight that stays compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compress import compress
from .compressed_tensor import CompressedTensor
from .compressed_weight import CompressedWeight
from .container import raw_bytes
from .contract import Layout
from .linear import check_mode, product


class CompressedLayer(nn.Module):
    """What both layers share: a weight that can be read and replaced, not trained.

    `state_dict()` has `compressed.blob`; a state dict with a dense `weight` is compressed when it is loaded.
    """

    compressed: CompressedWeight
    bias: nn.Parameter | None

    def _hold(self, weight: CompressedTensor | CompressedWeight, offload: bool) -> None:
        self.compressed = weight if isinstance(weight, CompressedWeight) else CompressedWeight(weight, offload)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at every access (requires_grad False). What is written into it is lost: assign to it.

        `.weight.shape` decodes as well: a tensor that put it off would have no memory to hand to NumPy, files or kernels.
        `compressed_weight` has `shape`, `dtype` and `device` at no cost.
        As with torch's layers another weight may have another dtype, and unties the layer. The same bits change nothing.
        """
        return self.compressed.tensor.decompress(verify="off")

    @weight.setter
    def weight(self, dense: Tensor) -> None:
        if not isinstance(dense, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(dense).__name__}")
        held = self.compressed
        if tuple(dense.shape) != held.header.shape:
            raise ValueError(f"the weight has shape {list(held.header.shape)}, got {list(dense.shape)}")
        if dense.dtype != held.dtype or not torch.equal(raw_bytes(dense), raw_bytes(self.weight)):
            self.compressed = CompressedWeight(held.recompress(dense, dense.dtype), held.offload, held.trained)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(
            value, nn.Parameter
        ):  # which nn.Module would register: there is no such name
            value = value.detach()
        super().__setattr__(name, value)

    @property
    def compressed_weight(self) -> CompressedTensor:
        """The weight as `fastloss.functional.linear_cross_entropy` takes it; its shape, dtype and device without decoding."""
        return self.compressed.tensor

    @property
    def blob(self) -> Tensor:
        """The compressed bytes."""
        return self.compressed.blob

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None:  # the dict is this call's own: load_state_dict copies it
            del state_dict[f"{prefix}weight"]
            own = self.compressed.header.shape
            if tuple(dense.shape) == own:
                adopts = local_metadata.get("assign_to_params_buffers", False)
                found = self.compressed.recompress(dense, dense.dtype if adopts else self.compressed.dtype)
                state_dict[f"{prefix}compressed.blob"] = found.blob
            else:
                errors.append(f"size mismatch for {prefix}weight: got {list(dense.shape)}, the layer has {list(own)}.")
                state_dict[f"{prefix}compressed.blob"] = self.blob
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class CompressedLinear(CompressedLayer):
    """torch.nn.Linear over a frozen compressed weight: y = x Wᵀ + bias; gradients of x and of the bias.

    Args:
        weight: W [out_features, in_features]; or the `CompressedWeight` of another layer, to be tied to it.
        bias: [out_features] or None.
        mode: "exact" (outputs bit for bit those of nn.Linear), "auto" or "fused": see `compressed_linear`. Can be set later.
        offload: as of `CompressedWeight`.

    Works in torch.compile(fullgraph=True). Where a blob's sections lie is a constant of the graph, so layers that are compiled
    one by one are a graph each: raise torch._dynamo.config.recompile_limit, or compile the model as a whole.

    Raises TypeError and ValueError.
    """

    def __init__(
        self, weight: CompressedTensor | CompressedWeight, bias: Tensor | None = None, mode: str = "exact",
        offload: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_mode(mode)
        self._hold(weight, offload)
        self.out_features, self.in_features = self.compressed.header.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        kept = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", kept)
        self.mode = mode

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, codec: str = "auto", tier: str = "fused", layout: str = "rows", mode: str = "exact",
        offload: bool = False, verify: bool = False,
    ) -> CompressedLinear:  # fmt: skip
        """The same layer with its weight compressed (as by `compress`); the bias is the same Parameter."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}")
        compressed = compress(linear.weight.detach(), codec, tier, layout, verify)
        weight = CompressedWeight(compressed, offload, linear.weight.requires_grad)
        return cls(weight, linear.bias, mode).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        held = self.compressed
        return product(x, self.bias, held.blob, held.plan, held.dtype, self.mode)

    def extra_repr(self) -> str:
        """As torch prints a Linear, and the mode."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"mode={self.mode}"
        )


class CompressedEmbedding(CompressedLayer):
    """torch.nn.Embedding over a frozen compressed table: only the rows (their blocks) that are looked up are decoded.

    Args:
        weight: [num_embeddings, embedding_dim], of layout rows; or another layer's `CompressedWeight`, to be tied to it.
        padding_idx: kept for those who read it: it names a row without a gradient, and no row has one here.
        offload: as of `CompressedWeight`.

    Raises TypeError and ValueError.
    """

    def __init__(
        self, weight: CompressedTensor | CompressedWeight, padding_idx: int | None = None, offload: bool = False
    ) -> None:
        super().__init__()
        self._hold(weight, offload)
        if self.compressed.header.layout != Layout.ROWS:
            raise ValueError("an embedding gathers rows, which layout tiles does not have: compress with layout='rows'")
        self.num_embeddings, self.embedding_dim = self.compressed.header.shape
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise ValueError(f"padding_idx must be within {self.num_embeddings} rows, got {padding_idx}")
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, codec: str = "auto", tier: str = "fused", offload: bool = False,
        verify: bool = False,
    ) -> CompressedEmbedding:  # fmt: skip
        """The same table compressed (as by `compress`). `sparse` and `scale_grad_by_freq` speak of a gradient there is not.

        Raises ValueError for max_norm, which rewrites the rows that are looked up.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"from_embedding takes a torch.nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(
                f"max_norm={embedding.max_norm} rewrites rows at every look-up: a compressed table is frozen"
            )
        compressed = compress(embedding.weight.detach(), codec, tier, verify=verify)
        weight = CompressedWeight(compressed, offload, embedding.weight.requires_grad)
        return cls(weight, embedding.padding_idx).train(embedding.training)

    def forward(self, index: Tensor) -> Tensor:
        """Rows by an int64 or int32 tensor of any shape: [*index.shape, embedding_dim]. IndexError (CPU) for no such row."""
        held = self.compressed
        blob = held.blob.to(index.device, non_blocking=True)
        rows = torch.ops.fastloss.lossless_rows(blob, held.plan, index.reshape(-1), held.dtype)
        return rows.reshape(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """As torch prints an Embedding."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def dense_layer(layer: CompressedLayer, weight: nn.Parameter) -> nn.Module:
    """The torch layer of this one, holding `weight`."""
    with torch.device("meta"):
        made: nn.Module
        if isinstance(layer, CompressedLinear):
            made = nn.Linear(layer.in_features, layer.out_features, bias=False)
            made.register_parameter("bias", layer.bias)
        elif isinstance(layer, CompressedEmbedding):
            made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        else:
            raise TypeError(f"not a compressed layer: {type(layer).__name__}")
    made.weight = weight
    return in_place_of(layer, made)


def in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` in the mode of training, and with all attributes, of the layer that it takes the place of."""
    vars(new).update({name: value for name, value in vars(old).items() if name not in _NOT_TAKEN_OVER})
    return new.train(old.training)


#: What nn.Module itself keeps, and the mode, which torch's layers do not have.
_NOT_TAKEN_OVER = frozenset([*vars(nn.Module()), "mode"])
