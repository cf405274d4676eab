"""The pair ops (docs/design.md, "The pair contract"): schemas and fakes. Each backend registers its kernels itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import NUM_PAIR_COLUMN_STATS, NUM_PAIR_MAP_STATS, NUM_PAIR_STATS, PairNeeds, PairWant
from ..ops import _define

PAIRING_SCHEMA = (
    "Tensor q, Tensor k, Tensor row_scale, Tensor? column_scale=None, Tensor? row_valid=None, Tensor? column_valid=None,"
    " Tensor? positive_rows=None, Tensor? positive_columns=None, int[] positive_diagonals=[],"
    " Tensor? excluded_rows=None, Tensor? excluded_columns=None, int[] excluded_diagonals=[],"
    " Tensor? low=None, Tensor? high=None, Tensor? guide_q=None, Tensor? guide_k=None, Tensor? guide_limit=None"
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"


def _table(q: Tensor, *shape: int) -> Tensor:
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def empty_gradients(
    q: Tensor, k: Tensor, column_scale: Tensor | None, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, drow_scale, dcolumn_scale), each empty where `needs` has not its flag."""
    return (
        q.new_empty(q.shape if needs & PairNeeds.Q else (0,)),
        k.new_empty(k.shape if needs & PairNeeds.K else (0,)),
        _table(q, q.shape[0] if needs & PairNeeds.ROW_SCALE else 0),
        _table(q, k.shape[0] if needs & PairNeeds.COLUMN_SCALE and column_scale is not None else 0),
    )


def _argument(args: tuple[Any, ...], index: int, default: Any) -> Any:
    return args[index] if len(args) > index else default


def _pair_stats_fake(q: Tensor, k: Tensor, row_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    want, keep = _argument(rest, 16, 0), _argument(rest, 18, 0)
    columns = k.shape[0] if want & PairWant.COLUMNS else 0
    return (
        _table(q, NUM_PAIR_STATS, q.shape[0]),
        _table(q, NUM_PAIR_COLUMN_STATS, columns),
        q.new_empty((keep,), dtype=torch.float32),
    )


def _pair_stats_backward_fake(
    row_grad: Tensor, column_grad: Tensor, rows: Tensor, columns: Tensor, kept: Tensor, q: Tensor, k: Tensor,
    row_scale: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(q, k, _argument(rest, 0, None), _argument(rest, 19, 15))


_STATS = f"{PAIRING_SCHEMA}, Tensor? boost=None, Tensor? margin=None, int want=0, float second=1.0, int keep=0"
_define(f"pair_stats({_STATS}) -> (Tensor, Tensor, Tensor)", _pair_stats_fake)
_define(
    f"pair_stats_backward(Tensor row_grad, Tensor column_grad, Tensor rows, Tensor columns, Tensor kept, {_STATS},"
    f" int needs=15) -> {_GRADIENTS}",
    _pair_stats_backward_fake,
)

_MAP = f"{PAIRING_SCHEMA}, Tensor? neg_threshold=None, Tensor? pos_threshold=None, int function=0"
_define(f"pair_map({_MAP}) -> Tensor", lambda q, *_: _table(q, NUM_PAIR_MAP_STATS, q.shape[0]))
_define(
    f"pair_map_backward(Tensor grad, {_MAP}, int needs=15) -> {_GRADIENTS}",
    lambda grad, q, k, row_scale, *rest: empty_gradients(q, k, _argument(rest, 0, None), _argument(rest, 17, 15)),
)

_HISTOGRAM = f"{PAIRING_SCHEMA}, int bins=2, float first=0.0, float step=1.0"
_define(
    f"pair_histogram({_HISTOGRAM}) -> Tensor",
    lambda q, k, row_scale, *rest: _table(q, 2, _argument(rest, 14, 2)),
)
_define(
    f"pair_histogram_backward(Tensor grad, {_HISTOGRAM}, int needs=15) -> {_GRADIENTS}",
    lambda grad, q, k, row_scale, *rest: empty_gradients(q, k, _argument(rest, 0, None), _argument(rest, 17, 15)),
)


def _row_topk_fake(q: Tensor, k: Tensor, row_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = _argument(rest, 14, 1)
    return _table(q, q.shape[0], count), q.new_empty((q.shape[0], count), dtype=torch.int64)


_define(f"row_topk({PAIRING_SCHEMA}, int count=1, int classes=1) -> (Tensor, Tensor)", _row_topk_fake)

_define(
    "edge_dot(Tensor q, Tensor k, Tensor rows, Tensor columns) -> Tensor",
    lambda q, k, rows, columns: _table(q, rows.shape[0]),
)
_define(
    "edge_sum(Tensor x, Tensor weight, Tensor pointer, Tensor source) -> Tensor",
    lambda x, weight, pointer, source: x.new_empty((pointer.shape[0] - 1, x.shape[1])),
)

from . import cpp, cuda, reference, triton  # noqa: E402,F401  (they register their kernels)
