"""The `reference` backend of the codec of saved activations: plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import kernel
from ..sampling import philox


def uniforms(seed: Tensor, n: int) -> Tensor:
    """U_i in [0, 1), float32 [n]: docs/design.md, "Groups of saved activations"."""
    block = torch.arange(-(-n // 4), device=seed.device)
    nothing = torch.zeros_like(block)
    words = torch.stack(philox((block & 0xFFFFFFFF, block >> 32, nothing, nothing), seed.reshape(())), -1)
    return (words.reshape(-1)[:n] >> 8).float() * 2.0**-24


@kernel("quantize_groups", "reference")
def quantize_groups(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, count = x.shape[0], -(-x.shape[0] // group)
    wide = torch.nn.functional.pad(x.float(), (0, count * group - n)).reshape(count, group)
    if low is None or high is None:
        last = x[-1:].float().expand(count * group - n)  # the last group may be short: filled with a number of its own
        full = torch.cat((x.float(), last)).reshape(count, group) if n else wide
        low, high = (full.amin(1), full.amax(1)) if count else (full.new_empty(0), full.new_empty(0))
    else:
        channel = torch.arange(count, device=x.device) % low.numel()
        low, high = low.float()[channel], high.float()[channel]
    top = 2**bits - 1
    step = (high - low) / top
    v = (wide - low[:, None]) / step[:, None]
    v = (
        v.round()
        if seed is None
        else (v + torch.nn.functional.pad(uniforms(seed, n), (0, count * group - n)).reshape(count, group)).floor()
    )
    codes = torch.where(step[:, None] > 0, v, 0.0).nan_to_num(0.0, top, 0.0).clamp(0, top).to(torch.uint8).reshape(-1)
    codes = torch.where(torch.arange(count * group, device=x.device) < n, codes, 0).reshape(count, group)
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4, low.contiguous(), step


@kernel("dequantize_groups", "reference")
def dequantize_groups(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> Tensor:
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return (low[:, None] + codes.float() * step[:, None]).reshape(-1)[:n].to(dtype)
