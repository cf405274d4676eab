"""The Triton kernels of pairs as their launchers build them, for GPUs that are not there (triton_aot.py measures them)."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastloss.triton_kernels import (
    edge_dot,
    pair_map_kernels,
    pair_stats_backward_kernels,
    pair_stats_kernels,
    pair_tiles,
    row_topk,
)
from fastloss.triton_kernels.linear_row_stats import GROUP, Tile
from fastloss.triton_kernels.pair_launch import default_tile, register_load
from triton.compiler import ASTSource

from triton_aot import CAPABILITY, ITEM_SIZE, Cost, measure

#: What each feature of a pairing brings along.
TENSORS = {
    "ids": ("positive_rows", "positive_columns"), "bits": ("positive_rows",),
    "excluded ids": ("excluded_rows", "excluded_columns"),
    "excluded bits": ("excluded_rows",), "window": ("low", "high"), "guide": ("guide_q", "guide_k", "guide_limit"),
    "valid": ("row_valid", "column_valid"), "column scale": ("column_scale", "column_factor"), "boost": ("boost",),
    "margin": ("margin",), "thresholds": ("neg_threshold", "pos_threshold"),
}  # fmt: skip
OPTIONAL = {*sum(TENSORS.values(), ()), "lift", "other_valid"}
DATA, GUIDES = {"q", "k", "scratch", "x", "sums"}, {"guide_q", "guide_k"}
INT32 = {"positive_rows", "positive_columns", "excluded_rows", "excluded_columns"}
BYTES = {"row_valid", "column_valid", "valid", "other_valid"}
INT64 = {"keys", "edge_rows", "edge_columns", "pointer", "source"}
FLOAT = {"second"}
COUNTS = set("first_block blocks splits parts first count edges p0 p1 e0 e1 s0 s1 r0 r1 r2 r3".split())
NEVER_ALIGNED = COUNTS | {"M", "N", "SIZE", "OTHER"}  # do_not_specialize


class PairCase(NamedTuple):
    """One kernel as one launch would build it."""

    kernel: str
    dtype: str
    target: str
    features: tuple[str, ...] = ("diagonal",)
    want: int = 1  # or the function of pair_map, or the classes of row_topk
    tma: bool = False
    tile: Tile | None = None  # instead of the launcher's choice

    def __str__(self) -> str:
        given = "+".join(self.features).replace(" ", "_")
        return f"{self.kernel}-{given}-{self.want}-{'tma-' if self.tma else ''}{self.dtype}-{self.target}"


def _tiled(case: PairCase) -> tuple[dict[str, Any], dict[str, int]]:
    """(compile-time arguments, warps and stages) of a kernel over tiles, as pair_launch.Launch chooses them."""
    has = {*case.features}
    ranked, gradient, statistics = (
        case.kernel == "row_topk",
        "gradient" in case.kernel,
        not case.kernel.startswith("pair_map"),
    )
    positive = bool(has & {"ids", "bits"}) or (ranked and case.want & 2 > 0)
    general = positive or ranked or bool(has & {"excluded ids", "excluded bits", "window", "guide"})
    extras = len(has & {"boost"}) + (bin(case.want & 6).count("1") if statistics and not ranked else 0)
    extras += case.kernel == "pair_map"
    if general:
        extras += len(has & {"margin", "column scale", "valid", "excluded ids", "excluded bits"}) + 2 * (
            "window" in has
        )
    bits, columns = bool(has & {"bits", "excluded bits"}), bool(statistics and case.want & 1)
    load = register_load(general, "guide" in has, ranked or bits, extras, columns)
    size = ITEM_SIZE[case.dtype]
    tile = case.tile or default_tile(size, load, gradient, CAPABILITY[case.target], case.tma)
    precision = "ieee" if size == 4 else "tf32"
    meta = dict(
        GENERAL=general, POSITIVE=positive, PD=int("diagonal" in has), ED=int("excluded diagonal" in has), BM=tile.rows,
        BN=tile.columns, BK=tile.depth, GROUP=GROUP, EVEN_D=True, TMA=case.tma, PRECISION=precision,
        GUIDE_PRECISION=precision, UPCAST=False,
    )  # fmt: skip
    return meta, dict(num_warps=tile.warps, num_stages=tile.stages)


def options(case: PairCase) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """(kernel, compile-time arguments, warps and stages)."""
    has, four = {*case.features}, dict(num_warps=4)
    pd, ed = int("diagonal" in has), int("excluded diagonal" in has)
    own = {
        "pair_stats": (pair_stats_kernels.pair_stats_kernel, dict(WANT=case.want)),
        "pair_gradient": (pair_stats_backward_kernels.pair_gradient_kernel, dict(WANT=case.want)),
        "pair_map": (pair_map_kernels.pair_map_kernel, dict(FUNCTION=case.want)),
        "pair_map_gradient": (pair_map_kernels.pair_map_gradient_kernel, dict(FUNCTION=case.want)),
        "row_topk": (row_topk.row_topk_kernel, dict(CLASSES=case.want, LIST=row_topk.LONGEST)),
    }
    if case.kernel in own:
        kernel, more = own[case.kernel]
        meta, launch = _tiled(case)
        return kernel, meta | more, launch
    merged = dict(GENERAL="ids" in has, PD=pd, REMOVED=pd + ed, BLOCK=128)
    if case.kernel in ("merge_rows", "merge_columns"):
        more = dict(
            ROWS=case.kernel == "merge_rows",
            WANT=case.want,
            POSITIVE="ids" in has,
            FIRST="first" in has,
            LAST="last" in has,
        )
        return pair_stats_kernels.pair_merge_kernel, merged | more, four
    others = {
        "diagonal": (pair_tiles.pair_diagonal_kernel, dict(ED=ed, BM=64, BK=64)),
        "diagonal_gradient": (
            pair_stats_backward_kernels.pair_diagonal_gradient_kernel,
            dict(WANT=case.want, BLOCK=128),
        ),
        "map_merge": (pair_map_kernels.pair_map_merge_kernel, dict(merged, FUNCTION=case.want)),
        "map_diagonal": (pair_map_kernels.pair_map_diagonal_kernel, dict(FUNCTION=case.want, BLOCK=128)),
        "edge_dot": (edge_dot.edge_dot_kernel, dict(BLOCK=edge_dot.EDGES, BK=edge_dot.DEPTH)),
        "edge_sum": (edge_dot.edge_sum_kernel, dict(BLOCK=edge_dot.SUM_EDGES, BK=edge_dot.SUM_DEPTH)),
    }
    return *others[case.kernel], four


def _type(case: PairCase, name: str, meta: dict[str, Any]) -> str:
    if case.tma and name in ("q", "k"):
        return f"tensordesc<{case.dtype}[{meta['BM' if name == 'q' else 'BN']},{meta['BK']}]>"
    if name in FLOAT:
        return "fp32"
    if name in COUNTS or name[0].isupper() or name.startswith("stride"):
        return "i32"
    if name in DATA | GUIDES:
        return f"*{case.dtype}"
    return "*i32" if name in INT32 else "*u8" if name in BYTES else "*i64" if name in INT64 else "*fp32"


def source(case: PairCase, kernel: Any, meta: dict[str, Any]) -> ASTSource:
    """The signature that a launch has whose tensors are 16-byte aligned and whose depths are multiples of 16."""
    given = set(sum((TENSORS.get(feature, ()) for feature in case.features), ()))
    if case.dtype == "fp16":
        given.add("lift")
    if "valid" in case.features:
        given.add("other_valid")
    signature: dict[str, str] = {}
    constants, attributes = dict(meta), {}
    for i, name in enumerate(kernel.arg_names):
        if name in OPTIONAL and name not in given:
            constants[name] = None
        signature[name] = "constexpr" if name in constants else _type(case, name, meta)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in NEVER_ALIGNED):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_pair_case(case: PairCase) -> Cost:
    """Build for the case's target and take the machine code apart."""
    kernel, meta, launch = options(case)
    return measure(source(case, kernel, meta), case.target, launch)
