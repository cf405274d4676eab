"""`CompressedWeight`: the frozen matrix of a layer, or of several layers that are tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compress import compress
from .compressed_tensor import CompressedTensor
from .contract import NUMBERS, P7_NUMBERS
from .errors import CorruptError, FormatError


class CompressedWeight(nn.Module):
    """A frozen matrix as a blob: the module that layers of one tied weight share, so that they stay tied.

    `.blob`, uint8, is a buffer: it moves with `.to(device)`, is saved, copied and pickled as it is. A conversion of dtypes
    (`.half()`, `.to(torch.float32)`) decodes it, converts the numbers as torch does and compresses them again.

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
        self.wish = compressed.header.codec.name.lower(), compressed.header.layout.name.lower()
        self.register_buffer("blob", _pinned(compressed.blob) if offload else compressed.blob)
        self._adopt(compressed)

    def _adopt(self, compressed: CompressedTensor) -> None:
        self.header, self.plan, self.dtype = compressed.header, compressed.plan, compressed.dtype

    @property
    def tensor(self) -> CompressedTensor:
        """The weight, for functions that take one: no copy."""
        return CompressedTensor(self.blob, self.header)

    def recompress(self, dense: Tensor, dtype: torch.dtype) -> CompressedTensor:
        """`dense` in `dtype`, by the codec and layout that the weight had at first, where they take that dtype."""
        codec, layout = self.wish
        if codec == "p7" and NUMBERS.get(dtype) not in P7_NUMBERS:
            codec, layout = "raw", "rows"
        return compress(dense.detach().to(self.blob.device, dtype), codec=codec, layout=layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedWeight:
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.blob.device)).dtype
        if dtype != self.dtype and not self.blob.is_meta:
            converted = self.recompress(self.tensor.decompress(), dtype)
            self._adopt(converted)
            self.blob = _pinned(converted.blob) if self.offload else converted.blob
        if self.offload:
            return self

        def moved(blob: Tensor) -> Tensor:
            there = fn(blob)  # nn.Module.type converts buffers of whole numbers, too
            return there if there.dtype == blob.dtype else blob.to(there.device)

        return super()._apply(moved, recurse)

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
