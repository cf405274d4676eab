"""`CompressedLinear` and `CompressedEmbedding`: torch's layers over a frozen weight that stays compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compress import compress
from .compressed_tensor import CompressedTensor
from .contract import Layout
from .errors import CorruptError, FormatError
from .linear import check_mode, product


class CompressedWeight(nn.Module):
    """A frozen matrix as a blob: the module that layers of one tied weight share, so that they stay tied.

    `.blob`, uint8, is a buffer: it moves with `.to(device)`, is saved, copied and pickled as it is, and no conversion of
    dtypes touches it.

    Args:
        compressed: the matrix.
        offload: keep the blob in CPU memory (pinned where CUDA is at hand) whatever the model moves to; every call copies the
            compressed bytes to the device of its input.
        trained: whether the weight was one that requires a gradient, for `decompress_model`.
    """

    blob: Tensor

    def __init__(self, compressed: CompressedTensor, offload: bool = False, trained: bool = False) -> None:
        super().__init__()
        if not isinstance(compressed, CompressedTensor):
            raise TypeError(f"compressed must be a CompressedTensor, got {type(compressed).__name__}")
        if len(compressed.header.shape) != 2:
            raise ValueError(f"a layer's weight is a matrix, got shape {list(compressed.header.shape)}")
        self.offload, self.trained = offload, trained
        self.register_buffer("blob", _pinned(compressed.blob) if offload else compressed.blob)
        self._adopt(compressed)

    def _adopt(self, compressed: CompressedTensor) -> None:
        self.header, self.plan, self.dtype = compressed.header, compressed.plan, compressed.dtype

    @property
    def tensor(self) -> CompressedTensor:
        """The weight, for functions that take one: no copy."""
        return CompressedTensor(self.blob, self.header)

    def set(self, compressed: CompressedTensor) -> None:
        """Hold another weight of the same shape, on the same device."""
        if compressed.header.shape != self.header.shape:
            raise ValueError(f"the weight has shape {list(self.header.shape)}, got {list(compressed.header.shape)}")
        self._adopt(compressed)
        self.blob = _pinned(compressed.blob) if self.offload else compressed.blob.to(self.blob.device)

    def recompress(self, dense: Tensor) -> CompressedTensor:
        """`dense`, in the weight's dtype, by the same codec and layout."""
        name = self.header.codec.name.lower()
        layout = self.header.layout.name.lower()
        return compress(dense.to(self.blob.device, self.dtype), codec=name, layout=layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedWeight:
        return self if self.offload else super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        blob = state_dict.get(f"{prefix}blob")
        if blob is not None:
            try:
                self._take(blob, bool(local_metadata.get("assign_to_params_buffers", False)))
            except (CorruptError, FormatError, ValueError) as error:
                errors.append(f"{prefix}blob: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _take(self, blob: Tensor, assign: bool) -> None:
        """Make room for a blob, once it is known to be an undamaged one that fits."""
        given = CompressedTensor(blob)
        if given.header.shape != self.header.shape:
            raise ValueError(f"holds shape {list(given.header.shape)}, the layer {list(self.header.shape)}")
        if given.dtype != self.dtype and not assign:
            raise ValueError(f"holds {given.dtype}, the layer {self.dtype}: load with assign=True to adopt it")
        given.verify()
        self._adopt(given)
        room = torch.empty(blob.shape, dtype=torch.uint8, device=self.blob.device)  # others may hold the old buffer
        self.blob = _pinned(room) if self.offload else room

    def extra_repr(self) -> str:
        """Codec, dtype and size."""
        dense = self.plan[3] * self.dtype.itemsize
        share = f", {100 * self.header.bytes / dense:.1f} %" if dense else ""
        return f"{self.header.codec.name} of {self.dtype}{share}{', offloaded' if self.offload else ''}"


def _pinned(blob: Tensor) -> Tensor:
    blob = blob.cpu()
    return blob.pin_memory() if torch.cuda.is_available() else blob


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
        """The dense weight, decoded at every access (requires_grad False). What is written into it is lost: assign to it."""
        return self.compressed.tensor.decompress(verify="off")

    @weight.setter
    def weight(self, dense: Tensor) -> None:
        self.compressed.set(self.compressed.recompress(dense.detach()))

    @property
    def compressed_weight(self) -> CompressedTensor:
        """The weight as `fastloss.functional.linear_cross_entropy` takes it."""
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
                state_dict[f"{prefix}compressed.blob"] = self.compressed.recompress(dense).blob
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
    return made.train(layer.training)
