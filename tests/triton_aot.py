"""Compile the Triton kernels for GPUs that are not there, as their launchers would, and read what the machine code costs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from fastloss.triton_kernels import (
    common,
    linear_row_stats_kernels,
    pointwise_loss,
    region_stats,
    row_sample_kernels,
    row_stats_kernels,
    row_terms,
    row_terms_gradient,
    row_terms_kernels,
    row_terms_scan,
    scale,
)
from fastloss.triton_kernels.linear_row_stats import GROUP, Tile, count_extras, default_tile
from fastloss.triton_kernels.row_sample import sample_block
from fastloss.triton_kernels.row_stats import cross_entropy_block, gradient_block, statistics_block
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
ITEM_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ALL = 31  # every bit of `want`
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"\b([HI]GMMA|UTC\w*MMA|[HI]MMA)\b")

DATA = {"x", "w", "bias", "logits", "dlogits", "prob", "dz", "teacher"}
ELEMENTS = {"input", "labels", "weight", "pos_weight", "upstream", "values", "dinput"}  # of pointwise_loss
INT64 = {"target", "argmax", "seed", "streams", "index", "listed"}
BYTES = {"mask", "labels"}
FLOAT = {"scale", "cap", "sharpness", "share", "a", "b", "c"}
COUNTS = set("splits ignore_index first_column width count mask_share weight_period pos_weight_period".split())
NEVER_ALIGNED = set("N splits ignore_index first_column weight_period pos_weight_period".split())  # do_not_specialize


class Case(NamedTuple):
    """One kernel as one launch would build it."""

    kernel: str
    dtype: str
    target: str
    want: int = 0
    softcap: bool = False
    absent: tuple[str, ...] = ()  # optional tensors that are not given
    tma: bool = False
    tile: Tile | None = None  # instead of the launcher's choice
    term: int = 0
    listed: int = 0  # columns
    splits: int = 1

    def __str__(self) -> str:
        extra = f"want{self.want}" + ("-softcap" if self.softcap else "") + ("-tma" if self.tma else "")
        soft = "-prob" if "target" in self.absent else ""
        if self.kernel.startswith("terms"):
            extra += f"-term{self.term}-listed{self.listed}-splits{self.splits}"
            extra += "".join(f"-no_{name}" for name in self.absent if name not in ("part", "part_index"))
        return f"{self.kernel}-{extra}{soft}-{self.dtype}-{self.target}"


class Cost(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled: int  # bytes of a thread's stack that are stored to
    shared: int
    matrix: tuple[str, ...]  # kinds of matrix instructions


def options(case: Case) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """(kernel, compile-time arguments, warps and stages), as the launchers choose them for a large problem."""
    size, v = ITEM_SIZE[case.dtype], 131072
    soft = "prob" not in case.absent
    rich = case.want != 0 or soft
    meta: dict[str, Any] = dict(SOFTCAP=case.softcap, WANT=case.want)
    if case.kernel == "merge":
        return common.merge_kernel, dict(WANT=case.want, SOFT=False, BLOCK=128), dict(num_warps=4)
    if case.kernel == "scale":
        return scale.scale_kernel, dict(BLOCK=scale.BLOCK), dict(num_warps=8)
    if case.kernel in ("region_stats", "region_gradient"):
        kernel = getattr(region_stats, f"{case.kernel}_kernel")
        return kernel, dict(WANT=case.want, BLOCK=region_stats.BLOCK), dict(num_warps=region_stats.WARPS)
    if case.kernel == "sample":
        block, warps = sample_block(v)
        return row_sample_kernels.row_sample_kernel, dict(SOFTCAP=case.softcap, BLOCK=block), dict(num_warps=warps)
    if case.kernel == "merge_sample":
        return row_sample_kernels.merge_sample_kernel, dict(SPLITS=64), dict(num_warps=1)
    if (
        case.kernel == "pointwise"
    ):  # `want` is the kind of loss; weights that are repeated, an upstream gradient for each
        meta = dict(WEIGHT=2, POS_WEIGHT=1, KIND=case.want, EACH=True, UNLESS_ONE=False, BLOCK=pointwise_loss.BLOCK)
        return pointwise_loss.pointwise_kernel, meta, dict(num_warps=pointwise_loss.WARPS)
    if case.kernel in ("terms_scan", "terms", "terms_gradient"):
        return terms_options(case, v, size)
    if case.kernel in ("linear_stats", "linear_gradient"):
        kernels = linear_row_stats_kernels
        kernel = kernels.linear_row_stats_kernel if case.kernel == "linear_stats" else kernels.linear_gradient_kernel
        extras = count_extras(case.want, case.softcap)
        tile = case.tile or default_tile(size, extras, CAPABILITY[case.target], case.tma)
        meta.update(BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=GROUP, EVEN_D=True, TMA=case.tma, UPCAST=False)
        meta.update(PRECISION="ieee" if size == 4 else "tf32")
        return kernel, meta, dict(num_warps=tile.warps, num_stages=tile.stages)
    kernels = row_stats_kernels
    kernel, (block, warps) = {
        "stats": (kernels.row_stats_kernel, statistics_block(v, rich)),
        "gradient": (kernels.row_gradient_kernel, gradient_block(v, rich)),
        "cross_entropy": (kernels.row_cross_entropy_kernel, cross_entropy_block(v, size, rich)),
    }[case.kernel]
    return kernel, dict(meta, BLOCK=block), dict(num_warps=warps)


def _pointee(case: Case, name: str) -> str:
    if name in DATA or (case.kernel == "pointwise" and name in ELEMENTS):
        return case.dtype
    if name in INT64:
        return "i64"
    if name in BYTES:
        return "i8"
    return {"part_index": "i32", "subset": "u8"}.get(name, "fp32")


def terms_options(case: Case, v: int, size: int) -> tuple[Any, dict[str, Any], dict[str, int]]:
    meta: dict[str, Any] = dict(SOFTCAP=case.softcap, WANT=case.want, K=case.listed)
    if case.kernel == "terms_gradient":
        block, warps = row_terms.gradient_block(v)
        return (
            row_terms_gradient.row_terms_gradient_kernel,
            dict(meta, TERM=case.term, BLOCK=block),
            dict(num_warps=warps),
        )
    meta["WANT"] = row_terms.complete(case.want, case.term)
    block, warps = row_terms.terms_block(v, size, case.want, case.splits)
    meta.update(SPLITS=case.splits, BLOCK=block)
    if case.kernel == "terms_scan":
        return row_terms_scan.row_terms_scan_kernel, meta, dict(num_warps=warps)
    meta.update(TERM=case.term, K_BLOCK=triton.next_power_of_2(max(case.listed, 1)))
    return row_terms_kernels.row_terms_kernel, meta, dict(num_warps=warps)


def source(case: Case, kernel: Any, meta: dict[str, Any]) -> ASTSource:
    """The signature that a launch has whose tensors are 16-byte aligned and whose sizes are multiples of 16."""
    signature: dict[str, str] = {}
    constants, attributes = dict(meta), {}
    for i, name in enumerate(kernel.arg_names):
        if name in case.absent:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif case.tma and name in ("x", "w"):
            signature[name] = f"tensordesc<{case.dtype}[{meta['BM' if name == 'x' else 'BN']},{meta['BK']}]>"
        elif name in FLOAT:
            signature[name] = "fp32"
        elif name[0].isupper() or name.startswith("stride") or name in COUNTS:
            signature[name] = "i32"
        else:
            pointee = _pointee(case, name)
            signature[name] = "*" + pointee
        if (signature[name] == "i32" and name not in NEVER_ALIGNED) or signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_case(case: Case) -> Cost:
    """Build for the case's target and take the machine code apart."""
    kernel, meta, launch = options(case)
    return measure(source(case, kernel, meta), case.target, launch)


def measure(code: ASTSource, target: str, launch: dict[str, int]) -> Cost:
    """What the code takes on `target`, one of CAPABILITY."""
    built = triton.compile(code, target=GPUTarget("cuda", int(target[3:]), 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, machine_code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)
    stack = _number("STACK", usage) + _number("LOCAL", usage)
    return Cost(
        registers=_number("REG", usage),
        spilled=stack if re.search(r"\bSTL\b", machine_code) else 0,  # a stack frame alone is no spill
        shared=built.metadata.shared,
        matrix=tuple(dict.fromkeys(MATRIX_INSTRUCTION.findall(machine_code))),
    )


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([os.fspath(TOOLS / name), *args], capture_output=True, text=True, check=True)
    return done.stdout


def _number(key: str, usage: str) -> int:
    found = re.search(rf"{key}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no {key}: {usage!r}")
    return int(found[1])
