"""linear_row_stats and its backward: tiles, allocation, launches. The logits x Wᵀ + b are never stored as a whole.

Forward: one kernel over tiles, the vocabulary split over programs, and a merge. Backward: a scratch of `width` columns of
the logits' gradient at a time, then two library GEMMs that read it; splitting columns rather than rows makes each part of
dW final. Nothing here waits for the GPU, and no sum depends on the order in which programs run.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import NUM_PARTS, merge, new_statistics, on_device, row_table, unit_columns
from .linear_row_stats_kernels import linear_gradient_kernel, linear_row_stats_kernel

INPUT, WEIGHT, BIAS = 1, 2, 4  # bits of `needs`
GROUP = 16
#: Columns of the scratch are chosen so that it takes about this much.
SCRATCH_BYTES = 128 << 20
#: fp16 gradients are brought to about 2^LIFT: nothing underflows that matters, and 2^8 of headroom is left.
LIFT = 8


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def default_tile(item_size: int, extras: int, capability: tuple[int, int], tma: bool) -> Tile:
    """The largest tile that does not spill with so many extra terms (tests/test_triton_compile.py holds that)."""
    if item_size == 4:
        return Tile(64, 128, 32, 8, 2)  # no matrix instruction multiplies in fp32
    if extras == 0 and capability[0] == 9 and tma:
        return Tile(128, 256, 64, 8, 3)
    columns = 128 if extras <= (2 if tma else 1) else 64  # addresses take registers that the copy engine does not
    if capability in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return Tile(128, columns, 64, 8, 3)
    return Tile(128, columns, 32, 8, 3)  # 8.6, 8.9, 12.x: about 100 KB of shared memory


def count_extras(want: int, softcap: bool) -> int:
    """Terms beyond the target and the log-sum that a tile carries in registers."""
    return bin(want).count("1") + softcap


def takes_tma(x: Tensor, w: Tensor, capability: tuple[int, int]) -> bool:
    """Can the copy engine of sm_90 and later read both operands?"""
    return capability[0] >= 9 and all(
        t.dtype != torch.float32
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) > 0
        for t in (x, w)
    )


class Launch:
    """What the two kernels have in common for one pair of operands."""

    def __init__(self, x: Tensor, w: Tensor, bias: Tensor | None, want: int, softcap: float, tile: Tile | None,
                 tma: bool | None) -> None:  # fmt: skip
        self.n, self.d = unit_columns("x", x).shape
        self.v = unit_columns("w", w).shape[0]
        self.x, self.w, self.want = x, w, int(want)
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
        self.tma = takes_tma(x, w, capability) if tma is None else tma
        self.tile = tile or default_tile(x.element_size(), count_extras(self.want, softcap != 0), capability, self.tma)
        self.row_blocks = triton.cdiv(self.n, self.tile.rows)
        self.options = dict(
            SOFTCAP=softcap != 0, WANT=self.want, BM=self.tile.rows, BN=self.tile.columns, BK=self.tile.depth, GROUP=GROUP,
            EVEN_D=self.d % self.tile.depth == 0, TMA=self.tma, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            UPCAST=x.dtype == torch.bfloat16 and not x.is_cuda, num_warps=self.tile.warps, num_stages=self.tile.stages,
        )  # fmt: skip

    def operands(self) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        if not self.tma:
            return self.x, self.w
        blocks = ((self.x, self.tile.rows), (self.w, self.tile.columns))
        x, w = (TensorDescriptor.from_tensor(t, [size, self.tile.depth]) for t, size in blocks)
        return x, w


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def split_count(x: Tensor, row_blocks: int, tiles: int) -> int:
    """Splits of the vocabulary: eight, or what fills the GPU when there are few blocks of rows."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return max(1, min(tiles, max(8, triton.cdiv(processors, max(1, row_blocks)))))


def linear_row_stats(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """stats [8, N] and argmax [N] (empty unless wanted) of the logits x wᵀ + bias."""
    launch = Launch(x, w, bias, want, softcap, tile, tma)
    n, v = launch.n, launch.v
    splits = splits or split_count(x, launch.row_blocks, triton.cdiv(v, launch.tile.columns))
    stats, argmax = new_statistics(x, n, want)
    part = torch.empty(NUM_PARTS, splits, n, dtype=torch.float32, device=x.device)
    part_index = torch.empty(splits, n, dtype=torch.int32, device=x.device)
    target, temperature = _contiguous(target), _contiguous(temperature)
    if n:
        with on_device(x):
            linear_row_stats_kernel[(launch.row_blocks * splits,)](
                *launch.operands(), _contiguous(bias), target, _contiguous(column_weight), temperature, part, part_index, n, v,
                launch.d, splits, x.stride(0), w.stride(0), ignore_index, scale, softcap, **launch.options,
            )  # fmt: skip
            merge(part, part_index, target, temperature, stats, argmax, v, ignore_index, False, launch.want)
    return stats, argmax


def linear_row_stats_backward(
    coef: Tensor,
    stats: Tensor,
    argmax: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
    needs: int,
    *,
    grad_weight: Tensor | None = None,
    width: int | None = None,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias, each empty unless needed. With `grad_weight`, an fp32 [V, D], dW is added to it and dw is empty."""
    launch = Launch(x, w, bias, want, softcap, tile, tma)
    n, v, d = launch.n, launch.v, launch.d
    if grad_weight is not None and (grad_weight.shape != w.shape or grad_weight.dtype != torch.float32):
        raise ValueError(f"grad_weight must be float32 {(v, d)}, got {grad_weight.dtype} {tuple(grad_weight.shape)}")
    coef, stats, argmax = row_table(coef), row_table(stats), argmax.contiguous()
    target, column_weight, temperature, dense_bias = map(_contiguous, (target, column_weight, temperature, bias))
    lift, unlift = lift_of(coef, x.dtype)
    fp32: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
    dx = torch.zeros(n, d, **fp32) if needs & INPUT else x.new_empty(0)
    dw = w.new_empty(w.shape) if needs & WEIGHT and grad_weight is None else w.new_empty(0)
    partial_bias = torch.empty(launch.row_blocks, v, **fp32) if needs & BIAS else None
    width = min(v, whole_tiles(width or default_width(n, x.element_size()), launch.tile.columns))
    scratch = torch.empty(n * width, dtype=x.dtype, device=x.device)
    with on_device(x):
        for first in range(0, v, max(1, width)):
            columns = min(width, v - first)
            dz = scratch[: n * columns].view(n, columns)
            if n:
                linear_gradient_kernel[(launch.row_blocks * triton.cdiv(columns, launch.tile.columns),)](
                    *launch.operands(), dense_bias, target, column_weight, temperature, stats, coef, argmax, lift, dz,
                    partial_bias, n, v, d, first, columns, x.stride(0), w.stride(0), stats.stride(0), coef.stride(0),
                    ignore_index, scale, softcap, **launch.options,
                )  # fmt: skip
            if needs & INPUT:
                add_product(dx, dz, w[first : first + columns])
            if grad_weight is not None and needs & WEIGHT:
                add_product(grad_weight[first : first + columns], dz.T, x, unlift)
            elif needs & WEIGHT:
                write_product(dw[first : first + columns], dz.T, x, unlift)
    dbias = x.new_empty(0)
    if partial_bias is not None:
        total = partial_bias.sum(0)
        total = total if unlift is None else total * unlift
        dbias = total if bias is None else total.to(bias.dtype)
    if needs & INPUT:
        dx = (dx if unlift is None else dx.mul_(unlift)).to(x.dtype)
    return dx, dw, dbias


def default_width(n: int, item_size: int) -> int:
    """Columns of the scratch: about SCRATCH_BYTES of them, and enough for a GEMM to be worth its launch."""
    return max(1024, SCRATCH_BYTES // max(1, n * item_size))


def whole_tiles(width: int, step: int) -> int:
    """Rounded down to whole tiles, at least one: rows of the scratch then start aligned."""
    return max(1, width // step) * step


def lift_of(coef: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """fp16 only: a power of two that brings the largest coefficient near 2^LIFT, and its inverse, as device scalars."""
    if dtype != torch.float16:
        return None, None
    largest = torch.where(coef.isfinite(), coef.abs(), 0.0).amax().clamp(min=2.0**-100)
    exponent = LIFT - torch.floor(torch.log2(largest))
    return torch.exp2(exponent), torch.exp2(-exponent)


@functools.cache
def accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Older torch wants the accumulator of addmm(out_dtype=) in the operands' dtype, and says so before it launches."""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor, unlift: Tensor | None = None) -> None:
    """total (fp32) += a @ b (* unlift), the product in fp32 too."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total += a.float() @ b.float() * (1.0 if unlift is None else unlift)
    elif unlift is None and accumulates_in_fp32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
        total += product if unlift is None else product.mul_(unlift)


def write_product(out: Tensor, a: Tensor, b: Tensor, unlift: Tensor | None) -> None:
    """out = a @ b, rounded once; a lifted product is scaled back in fp32, where it cannot overflow."""
    if a.is_cuda and unlift is not None:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32).mul_(unlift))
    elif a.is_cuda or a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float() * (1.0 if unlift is None else unlift))
