"""The op `row_sample`: its noise in plain PyTorch (the `reference` backend), and the glue of the compiled backends.

docs/design.md, "Sampling", says what every backend must draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend_cpp, backend_cuda, backend_triton
from .compiled import _C, DTYPES, why_not_rows
from .reference import INF, scores
from .registry import kernel

_FACTOR, _STEP = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
#: First 32 bits below this number are followed by 32 more: the tail needs them.
COARSE = 1 << 16
#: Elements that the reference works on at a time: its 64-bit temporaries are many.
_PIECE = 1 << 20


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four words of 32 bits, held in int64, from a counter of four words and a seed of 64 bits.

    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = counter
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        first, second = c0 * _FACTOR[0], c2 * _FACTOR[1]  # wrapped to 64 bits, of which all are there
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ key[0], second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ key[1], first & _WORD
        key = [key[0] + _STEP[0] & _WORD, key[1] + _STEP[1] & _WORD]
    return c0, c1, c2, c3


def exponentials(seed: Tensor, streams: Tensor, v: int) -> Tensor:
    """E [N, V] in float64: independent exponential numbers of rate 1, one for every stream and column."""
    blocks = torch.arange(-(-v // 4), device=streams.device).expand(len(streams), -1)
    low, high = ((streams >> shift & _WORD)[:, None].expand_as(blocks) for shift in (0, 32))

    def words(half: int) -> Tensor:
        made = philox((blocks, torch.full_like(blocks, half), low, high), seed)
        return torch.stack(made, -1).reshape(len(streams), -1)[:, :v].double()

    bits, more = words(0), words(1)
    uniform = torch.where(bits < COARSE, bits + (more + 0.5) * 2.0**-32, bits + 0.5) * 2.0**-32
    return -torch.log1p(-uniform)


@kernel("row_sample", "reference")
def row_sample(logits: Tensor, seed: Tensor, streams: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """index [N] and logp [N]; computed in float64 from scores in the logits' own accuracy."""
    rows = max(1, _PIECE // max(1, logits.shape[1]))
    parts = [_sample(z, seed, s, scale, softcap) for z, s in zip(logits.split(rows), streams.split(rows), strict=True)]
    index, logp = (torch.cat(t) for t in zip(*parts, strict=True))
    return index, logp.to(torch.promote_types(logits.dtype, torch.float32))


def _sample(logits: Tensor, seed: Tensor, streams: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    n, v = logits.shape
    if not v:
        return streams.new_full((n,), -1), logits.new_full((n,), torch.nan, dtype=torch.float64)
    z = torch.where(logits == -INF, -INF, scores(logits, scale, softcap)).double()
    lse = z.logsumexp(-1)
    key = z - exponentials(seed, streams, v).log()
    top = key.amax(-1, keepdim=True)
    columns = torch.arange(v, device=z.device)
    index = torch.where(key == top, columns, v).amin(-1)  # the lowest of equal keys
    drawn = lse.isfinite()
    picked = z.gather(1, torch.where(drawn, index, 0)[:, None])[:, 0]
    return torch.where(drawn, index, -1), torch.where(drawn, picked - lse, torch.nan)


def _why_not(missing: Callable[[Tensor], str | None]) -> Callable[..., str | None]:
    return lambda logits, *_: missing(logits) or why_not_rows(logits, None)


def _compiled(launch: Callable[..., None], missing: Callable[[Tensor], str | None]) -> Callable[..., Any]:
    """The op on one launcher of `_C`, which gets the fields of csrc/fastloss.h's RowSample by name."""

    def call(logits: Tensor, seed: Tensor, streams: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        n, v = logits.shape
        check_noise(logits, seed, streams)
        seed, streams = seed.contiguous(), streams.contiguous()
        index = torch.empty(n, dtype=torch.int64, device=logits.device)
        logp = torch.empty(n, dtype=torch.float32, device=logits.device)
        if n:
            launch(
                logits, logits=logits.data_ptr(), seed=seed.data_ptr(), streams=streams.data_ptr(),
                index=index.data_ptr(), logp=logp.data_ptr(), n=n, v=v, ld=logits.stride(0),
                dtype=DTYPES[logits.dtype], scale=scale, softcap=softcap,
            )  # fmt: skip
        return index, logp

    return call


def check_noise(logits: Tensor, seed: Tensor, streams: Tensor) -> None:
    """Kernels read one seed and a stream a row from the logits' device: anything else would be read out of bounds."""
    for name, t, numbers in (("seed", seed, 1), ("streams", streams, logits.shape[0])):
        if t.dtype != torch.int64 or t.numel() != numbers or t.device != logits.device:
            raise ValueError(
                f"{name} must hold {numbers} torch.int64 on {logits.device}, got {t.numel()} {t.dtype} on {t.device}"
            )


def _launch_cpu(logits: Tensor, /, **fields: Any) -> None:
    _C.row_sample_cpu(**fields, isa=backend_cpp.ISA)  # type: ignore[union-attr]


def _launch_cuda(logits: Tensor, /, **fields: Any) -> None:
    device = logits.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.row_sample_cuda(**fields, device=device, stream=stream)  # type: ignore[union-attr]


kernel("row_sample", "cpp", _why_not(backend_cpp._missing))(_compiled(_launch_cpu, backend_cpp._missing))
kernel("row_sample", "cuda", _why_not(backend_cuda._missing))(_compiled(_launch_cuda, backend_cuda._missing))


@kernel("row_sample", "triton", _why_not(backend_triton._missing))
def _triton(logits: Tensor, seed: Tensor, streams: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    from .triton_kernels import row_sample as kernels

    check_noise(logits, seed, streams)
    return kernels.row_sample(logits, seed, streams, scale, softcap)
