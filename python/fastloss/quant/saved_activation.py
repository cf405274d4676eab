"""Activations saved for the backward as codes of 8 or 4 bits ("Mesa: A Memory-saving Training Framework for Transformers").

The forward is exact; what the backward reads is quantised in groups: docs/design.md, "Groups of saved activations".
"""

from __future__ import annotations

import math
import weakref
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)

_ops = torch.ops.fastloss
#: Views and casts: a tensor made of a parameter by these is that parameter.
_SAME_NUMBERS = frozenset(
    f"{name}Backward0"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Select",
        "Slice", "AsStrided", "Alias", "Split", "ToCopy",
    )
)  # fmt: skip


class EncodedActivation(NamedTuple):
    """A tensor as codes. codes: uint8 [G, group bits / 8]; low, step: float32 [G]; G groups of `group` numbers."""

    codes: Tensor
    low: Tensor
    step: Tensor
    shape: torch.Size
    dtype: torch.dtype
    group: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges."""
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes

    def part(self, begin: int, end: int) -> Tensor:
        """Numbers begin .. end of the flat tensor; begin is a multiple of `group`."""
        first, last = begin // self.group, -(-end // self.group)
        codes, low, step = (t[first:last] for t in (self.codes, self.low, self.step))
        return _ops.dequantize_groups.default(codes, low, step, end - begin, self.group, self.bits, self.dtype)

    def decode(self) -> Tensor:
        """x' = low + code step, in x's shape and dtype."""
        return self.part(0, math.prod(self.shape)).reshape(self.shape)


class ActivationCodec:
    """Floating tensors to codes of 8 or 4 bits, in groups of `group` neighbours of the flat tensor, and back.

    step = (high - low) / (2^bits - 1); code = round((x - low) / step), half to even, or with `stochastic`
    floor((x - low) / step + U), U uniform in [0, 1), so that the mean of x' is x. Codes are clamped. low, high are the
    group's minimum and maximum, so that |x' - x| <= step / 2, stochastic <= step (besides rounding to x's dtype); a
    group of equal numbers is exact.

    With `ema`, ranges are running means instead: ema old + (1 - ema) new, of each `group` channels of the last dimension over
    all else (of the whole tensor, where `group` does not divide that dimension); the first call takes its own. What lies outside
    is clamped. One codec then belongs to one place of a model.

    A NaN in a group makes all of it NaN; with `ema` so does an infinity, in its channels, and the running range stays as it was.

    Args:
        bits: 8 or 4.
        group: numbers that share a range, a multiple of 2.
        stochastic: a seed is drawn from torch's generator at each call.
        ema: None, or in [0, 1).

    Raises ValueError and TypeError.
    """

    def __init__(self, bits: int = 8, group: int = 256, stochastic: bool = False, ema: float | None = None) -> None:
        if bits not in (4, 8):
            raise ValueError(f"bits must be 8 or 4, got {bits}")
        if group != int(group) or group < 2 or group % 2:
            raise ValueError(f"group must be a multiple of 2, got {group}")
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), or None, got {ema}")
        self.bits, self.group, self.stochastic, self.ema = bits, int(group), stochastic, ema
        #: The running ranges, float32 [channel groups], with `ema`.
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def encode(self, x: Tensor) -> EncodedActivation:
        """The codes of x, any shape; float32, float16 or bfloat16 (float64 as float32)."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
            )
        flat = x.detach().reshape(-1)
        low, high = self._ranges(flat, x.shape[-1] if x.dim() else 1) if self.ema is not None else (None, None)
        seed = torch.randint(2**62, (1,), device=x.device) if self.stochastic else None
        group = min(self.group, max(2, flat.numel() + flat.numel() % 2))  # codes fill a whole group
        codes, low, step = _ops.quantize_groups.default(flat, group, self.bits, low, high, seed)
        return EncodedActivation(codes, low, step, x.shape, x.dtype, group, self.bits)

    def decode(self, encoded: EncodedActivation) -> Tensor:
        """x' of what `encode` returned."""
        return encoded.decode()

    def _ranges(self, flat: Tensor, columns: int) -> tuple[Tensor | None, Tensor | None]:
        """The ranges of this call; the running ones take it in."""
        assert self.ema is not None
        if not flat.numel():
            return self.low, self.high
        channels = columns // self.group if columns % self.group == 0 else 1
        numbers = flat.reshape(-1, channels, self.group if channels > 1 else flat.numel() // channels)
        now = numbers.amin((0, 2)).float(), numbers.amax((0, 2)).float()
        fine = now[0].isfinite() & now[1].isfinite()
        if self.low is None or self.high is None:
            before = now
        elif self.low.numel() != channels:
            raise ValueError(
                f"a codec with ema is for one place: it has {self.low.numel()} ranges, got x with {channels}; "
                "use another codec there"
            )
        else:
            before = (self.low.to(flat.device), self.high.to(flat.device))
        mixed = tuple(
            torch.where(old.isfinite(), self.ema * old + (1 - self.ema) * new, new)
            for old, new in zip(before, now, strict=True)
        )
        self.low, self.high = (torch.where(fine, new, old) for new, old in zip(mixed, before, strict=True))
        return tuple(torch.where(fine, new, torch.nan) for new in mixed)  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"ActivationCodec(bits={self.bits}, group={self.group}, stochastic={self.stochastic}, ema={self.ema})"


class _Packed:
    """What several nodes of the graph that saved one tensor share."""

    __slots__ = ("__weakref__", "encoded", "source")

    def __init__(self, encoded: EncodedActivation, source: Tensor) -> None:
        self.encoded, self.source = encoded, weakref.ref(source)


class _Handle(NamedTuple):
    """A tensor as it was saved: dimension order[i] of it is dimension i in memory."""

    packed: _Packed
    shape: torch.Size
    order: tuple[int, ...]


class saved_activation:
    """Saves the activations of all differentiable operations in a block as codes of 8 or 4 bits.

        saving = saved_activation(bits=8)
        with saving:
            loss = model(batch)
        loss.backward()

    Codes as of `ActivationCodec`, which has `bits`, `group`, `stochastic` and `ema` (Mesa: stochastic=True, ema=0.9).
    Left exact are integers, tensors of fewer than `min_numel` numbers, parameters (leaves that need a gradient, their
    views and casts), and, without `constants`, whatever else needs no gradient: a batch, and statistics like the
    inverse deviations of a LayerNorm. A tensor that several operations save is packed once.

    With `ema` the running ranges belong to the order of the saved tensors within the block: use one object for one model, and
    the same operations every time.

    Args:
        bits, group, stochastic, ema: of `ActivationCodec`.
        min_numel: the fewest numbers that are packed.
        constants: pack what needs no gradient, too.

    Attributes:
        exact_bytes, packed_bytes: of the tensors packed in the last block, as they were and as codes.
    """

    def __init__(
        self,
        bits: int = 8,
        group: int = 256,
        stochastic: bool = False,
        ema: float | None = None,
        *,
        min_numel: int = 4096,
        constants: bool = False,
    ) -> None:
        self._options = (bits, group, stochastic, ema)
        self._codec = ActivationCodec(*self._options)
        if min_numel < 1:
            raise ValueError(f"min_numel must be at least 1, got {min_numel}")
        self.min_numel, self.constants = min_numel, constants
        self.exact_bytes = self.packed_bytes = 0
        self._places: dict[tuple[int, int], ActivationCodec] = {}
        self._shared: weakref.WeakValueDictionary[tuple[Any, ...], _Packed] = weakref.WeakValueDictionary()
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._place = 0

    def __enter__(self) -> saved_activation:
        self._place = self.exact_bytes = self.packed_bytes = 0
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.pop().__exit__(kind, error, trace)
        self._shared.clear()

    def takes(self, t: Tensor) -> bool:
        """Whether `pack` makes codes of t."""
        return (
            t.is_floating_point()
            and t.layout == torch.strided
            and t.numel() >= self.min_numel
            and (self.constants or t.requires_grad)
            and not is_parameter(t)
            and t.untyped_storage().nbytes() >= t.numel() * t.element_size()  # not a few numbers repeated
        )

    def pack(self, t: Tensor) -> Tensor | _Handle:
        """The pack hook: t itself, or what `unpack` makes t' of."""
        if not self.takes(t):
            return t
        order = tuple(sorted(range(t.dim()), key=t.stride, reverse=True))
        in_memory = t.detach().permute(order)
        source = t if t._base is None else t._base
        width = in_memory.shape[-1] if t.dim() else 1
        key = (
            id(source), t._version, t.dtype, t.storage_offset(), t.numel(), width,
            () if in_memory.is_contiguous() else (in_memory.shape, in_memory.stride()),
        )  # fmt: skip
        packed = self._shared.get(key)
        if packed is None or packed.source() is not source:
            encoded = self._codec_here(width).encode(in_memory)
            packed = self._shared[key] = _Packed(encoded, source)
            self.exact_bytes += t.nbytes
            self.packed_bytes += encoded.nbytes
        return _Handle(packed, in_memory.shape, order)

    def unpack(self, saved: Tensor | _Handle) -> Tensor:
        """The unpack hook."""
        if isinstance(saved, Tensor):
            return saved
        t = saved.packed.encoded.decode().reshape(saved.shape)
        return t.permute(tuple(sorted(range(len(saved.order)), key=saved.order.__getitem__)))

    def _codec_here(self, width: int) -> ActivationCodec:
        """With ema the codec of the next place in the block, else the one for all."""
        if self._codec.ema is None:
            return self._codec
        self._place += 1
        return self._places.setdefault((self._place, width), ActivationCodec(*self._options))


def is_parameter(t: Tensor) -> bool:
    """Whether t is a leaf that needs a gradient, or a view or cast of one."""
    if t.grad_fn is None:
        return t.requires_grad
    node: Any = t.grad_fn
    while node is not None and node.name() in _SAME_NUMBERS:
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"
