"""row_sample: a token of each row's softmax and its log-probability, from logits that exist; see docs/design.md, "Sampling"."""

import torch
import triton
from torch import Tensor

from .common import on_device, unit_columns
from .row_sample_kernels import merge_sample_kernel, row_sample_kernel
from .row_stats import split_count


def sample_block(v: int) -> tuple[int, int]:
    """(columns a step, warps): 8 columns a thread, each with the noise of its best one beside it."""
    block = min(2048, triton.next_power_of_2(max(v, 32)))
    return block, max(1, block // 256)


def row_sample(
    logits: Tensor,
    seed: Tensor,
    streams: Tensor,
    scale: float,
    softcap: float,
    *,
    block: int | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """index [N] int64 and logp [N] float32."""
    n, v = unit_columns("logits", logits).shape
    default_block, warps = sample_block(v)
    block = block or default_block
    splits = splits or split_count(n, v, block)
    index = torch.empty(n, dtype=torch.int64, device=logits.device)
    logp = torch.empty(n, dtype=torch.float32, device=logits.device)
    part = torch.empty(4, splits, n, dtype=torch.float32, device=logits.device)
    part_index = torch.empty(splits, n, dtype=torch.int32, device=logits.device)
    if n:
        with on_device(logits):
            row_sample_kernel[(n, splits)](
                logits, seed, streams.contiguous(), part, part_index, v, n, splits, logits.stride(0), scale, softcap,
                SOFTCAP=softcap != 0, BLOCK=block, num_warps=warps,
            )  # fmt: skip
            merge_sample_kernel[(n,)](
                part, part_index, index, logp, n, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1
            )
    return index, logp
