"""The pair kernels at the shapes of docs/device.md: cases of device_kernels.py.

"gemms" is the floor: the products alone, by torch.mm into memory that is there. A forward is one (S), a backward three (S,
dQ and dK), a step four. Rows of each result are compared with a formula in float64 that makes those rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from common import Group, views
from device_timing import DEVICE, Case, in_turn, kernels, on, peak, relative, sample
from fastloss.contract import PairFunction, PairStat, PairWant
from fastloss.pairs.pairing import Pairing
from implementations import backend, build

ops = torch.ops.fastloss
SCALE, BIAS, COUNT = 20.0, 10.0, 10
GEMMS = {"stats": 1, "backward": 3, "step": 4, "compiled": 4, "map": 1, "map back": 3, "topk": 1}
#: Rows and columns that edges join: both tables fit the L2 cache of an H200.
EDGE_ROWS = 32768
COLUMN_BLOCK = 2048


def pair_cases(tiny: bool) -> list[Case]:
    """What matters most first. Shapes: B, D; of edges E, D."""
    large, small, edges = ((70, 24), (33, 16), (90, 24)) if tiny else ((32768, 768), (8192, 256), (200_000, 256))

    def of(shape: tuple[int, int], *modes: str) -> list[Case]:
        return [Case("pairs", mode, "bfloat16", shape) for mode in modes]

    return [
        *of(large, "stats", "backward", "step"),
        *of(small, "stats", "backward", "step"),
        *of(edges, "edge_dot", "edge_sum"),
        *of(large, "map", "map back", "topk"),
        *of(small, "map", "map back", "topk", "compiled"),
    ]


def products(q: Tensor, k: Tensor, count: int) -> Callable[[], object]:
    """`count` products of 2 B B D FLOP: S, dQ, dK, and S again."""
    s, dq, dk = q.new_empty(len(q), len(k)), torch.empty_like(q), torch.empty_like(k)

    def call() -> None:
        for number in range(count):
            if number in (0, 3):
                torch.mm(q, k.T, out=s)
            elif number == 1:
                torch.mm(s, k, out=dq)
            else:
                torch.mm(s.T, q, out=dk)

    s.zero_()
    return call


def clip_gradients(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of CLIP's loss with respect to the two tables of pair_stats."""

    def gradient(table: Tensor) -> Tensor:
        x = (table[PairStat.NEG_MAX] - table[PairStat.POS_MAX]) + (
            table[PairStat.NEG_LOGSUM] - table[PairStat.POS_LOGSUM]
        )
        out = torch.zeros_like(table)
        out[PairStat.NEG_LOGSUM] = torch.sigmoid(x) / (2 * x.numel())
        out[PairStat.POS_LOGSUM] = -out[PairStat.NEG_LOGSUM]
        return out

    return gradient(rows), gradient(columns)


def truth(mode: str, q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Of the rows `at`, in float64: log-sum-exp of the negatives, sums of phi, best scores, or dQ."""
    z = SCALE * (q[at].double() @ k.double().T)
    own = F.one_hot(at, len(k)).bool()
    if mode == "stats":
        return z.masked_fill(own, -torch.inf).logsumexp(1)
    if mode == "topk":
        return z.topk(COUNT).values
    if mode == "map":
        return F.softplus(z - BIAS).masked_fill(own, 0).sum(1)
    if mode == "map back":
        slope = torch.where(own, -torch.sigmoid(BIAS - z), torch.sigmoid(z - BIAS))
        return SCALE / len(q) * (slope @ k.double())
    columns = torch.cat([(SCALE * (q.float() @ part.float().T)).logsumexp(0) for part in k.split(COLUMN_BLOCK)])
    slope = z.softmax(1) + (z - columns.double()).exp() - 2 * own.double()
    return SCALE / (2 * len(q)) * (slope @ k.double())


def pair_calls(mode: str, q: Tensor, k: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    """(one call, what of its result is compared): both run under the backend that is being measured."""
    p = Pairing(q, k, torch.full((len(q),), SCALE, device=DEVICE), positive_diagonals=(0,))
    tail = None, None, int(PairWant.COLUMNS), 1.0, 0
    bias, phi = torch.full((len(q),), BIAS, device=DEVICE), int(PairFunction.SOFTPLUS)
    if mode == "stats":
        return lambda: ops.pair_stats(*p, *tail), lambda out: out[0][:2].sum(0)
    if mode == "topk":
        return lambda: ops.row_topk(*p, COUNT, 3), lambda out: out[0]
    if mode == "map":
        return lambda: ops.pair_map(*p, bias, bias, phi), lambda out: out[0]
    if mode == "map back":
        upstream = torch.zeros(8, len(q), device=DEVICE)
        upstream[:2] = 1 / len(q)
        return lambda: ops.pair_map_backward(upstream, *p, bias, bias, phi, 7), lambda out: out[0]

    def step(tables: Any = None, grads: Any = None) -> Any:
        tables = ops.pair_stats(*p, *tail) if tables is None else tables
        return ops.pair_stats_backward(*(grads or clip_gradients(*tables[:2])), *tables, *p, *tail, 7)

    if mode == "backward":
        tables = ops.pair_stats(*p, *tail)
        grads = clip_gradients(*tables[:2])
        return lambda: step(tables, grads), lambda out: out[0]
    return step, lambda out: out[0]


def pair_case(case: Case) -> dict[str, Any]:
    """One op, or a step of CLIP ("step"; "compiled" beside open_clip's formula, eager and by torch.compile)."""
    if case.mode.startswith("edge"):
        return edge_case(case)
    group = Group("clip", "forward+backward", case.dtype, case.shape, "peaked", DEVICE)
    q, k = views(group)
    at = sample(len(q))
    expected = truth(case.mode, q, k, at)
    errors, calls, extra = {}, {}, {}
    for name in kernels():
        try:
            with backend(name):
                call, compared = pair_calls(case.mode, q, k)
                errors[f"fastloss-{name}"] = relative(compared(call())[at], expected)
        except fastloss.BackendError:
            continue  # this backend has no kernel for it
        calls[f"fastloss-{name}"] = on(name, call)
        extra[f"fastloss-{name}"] = peak(calls[f"fastloss-{name}"])
    calls["gemms"] = products(q, k, GEMMS[case.mode])
    if case.mode == "compiled":
        peers = build(group).calls
        calls.update({name: peers[name] for name in ("torch", "torch_compile")})
    times, failed = in_turn(calls)
    return {"ms": times, "failed": failed, "errors": errors, "extra_bytes": extra,
            "flops": 2 * GEMMS[case.mode] * len(q) ** 2 * q.shape[1]}  # fmt: skip


def edge_case(case: Case) -> dict[str, Any]:
    """Random edges; edge_sum is the gradient of edge_dot with respect to q."""
    edges, d = case.shape
    rows_count = min(EDGE_ROWS, edges)
    q, k = views(Group("clip", "forward", case.dtype, (rows_count, d), "peaked", DEVICE))
    rows = torch.randint(0, rows_count, (edges,), device=DEVICE).sort().values
    columns = torch.randint(0, rows_count, (edges,), device=DEVICE)
    pointer = torch.searchsorted(rows, torch.arange(rows_count + 1, device=DEVICE))
    weight = torch.rand(edges, device=DEVICE)

    def call(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        if case.mode == "edge_dot":
            return ops.edge_dot(q, k, rows, columns)
        return ops.edge_sum(k, weight, pointer, columns)

    with backend("reference"):
        expected = call(q.double(), k.double(), weight.double())
    errors, calls = {}, {}
    for name in kernels():
        try:
            with backend(name):
                errors[f"fastloss-{name}"] = relative(call(q, k, weight), expected)
        except fastloss.BackendError:
            continue
        calls[f"fastloss-{name}"] = on(name, lambda: call(q, k, weight))
    calls["torch"] = lambda: (
        (q[rows] * k[columns]).sum(1) if case.mode == "edge_dot" else
        torch.zeros_like(q).index_add_(0, rows, k[columns] * weight[:, None].to(k.dtype))
    )  # fmt: skip
    times, failed = in_turn(calls)
    tables = 2 if case.mode == "edge_dot" else 1
    return {"ms": times, "failed": failed, "errors": errors, "nbytes": tables * edges * d * q.element_size()}
