"""The nearest of many keys, without the matrix of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import row_topk
from ..registry import kernel
from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)

_ops = torch.ops.fastloss
#: So many keys of each row are measured again in float64.
_CANDIDATES = 4
#: float64 numbers of differences x - k that are held at a time.
_HELD = 1 << 21


def nearest_key(x: Tensor, keys: Tensor) -> Tensor:
    """argmin over j of |x_i - k_j|^2, the lowest j among equals: int64 [M].

    The distances are those of float64: keys that float32 cannot tell apart are measured again, so the answer does not
    depend on the backend. The matrix [M, N] is not stored, on any backend of `row_topk`.

    Args:
        x: [M, D], or [C, M, D] for C codebooks; float32, float16, bfloat16 or float64.
        keys: [N, D], or [C, N, D], N >= 1; of the same dtype.

    Returns:
        int64 [M] or [C, M]. A row with a NaN or an infinity has no nearest key: -1. Keys with one are never chosen. No
        gradient.

    Raises ValueError and TypeError for shapes, dtypes and devices that do not fit. The search of "Discrete Key-Value
    Bottleneck".
    """
    for name, t in (("x", x), ("keys", keys)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(
                f"{name} must be a floating tensor, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}"
            )
    if x.dtype != keys.dtype:
        raise TypeError(f"x and keys must have one dtype, got {x.dtype} and {keys.dtype}")
    if x.device != keys.device:
        raise ValueError(f"x and keys must be on one device, got {x.device} and {keys.device}")
    if (
        x.dim() not in (2, 3)
        or keys.dim() != x.dim()
        or x.shape[:-2] != keys.shape[:-2]
        or x.shape[-1] != keys.shape[-1]
    ):
        raise ValueError(
            f"x and keys must be [M, D] and [N, D], or [C, M, D] and [C, N, D], got {list(x.shape)} and {list(keys.shape)}"
        )
    if keys.shape[-2] == 0:
        raise ValueError(f"keys must hold at least one key, got {list(keys.shape)}")
    x, keys = x.detach(), keys.detach()
    if x.dim() == 2:
        return _ops.nearest_key.default(x, keys)
    found = [_ops.nearest_key.default(a, k) for a, k in zip(x, keys, strict=True)]
    return torch.stack(found) if found else x.new_empty(x.shape[:-1], dtype=torch.int64)


def _distances(x: Tensor, keys: Tensor) -> Tensor:
    """|x - k|^2 in float64 over the last dimension."""
    return (x.double() - keys.double()).square().sum(-1)


def _among_all(x: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """The nearest key of each row by all distances in float64, a block of them at a time."""
    rows, width = x.shape[0], max(1, x.shape[1])
    best = torch.full((rows,), torch.inf, dtype=torch.float64, device=x.device)
    index = torch.zeros(rows, dtype=torch.int64, device=x.device)
    many_rows = max(1, min(rows, 64))
    many_keys = max(1, _HELD // (width * many_rows))
    for r in range(0, rows, many_rows):
        part = slice(r, r + many_rows)
        for j in range(0, keys.shape[0], many_keys):
            d = _distances(x[part, None], keys[None, j : j + many_keys])
            d = torch.where(valid[j : j + many_keys], d, torch.inf)
            least, at = d.min(1)
            # min gives any of several equals on a GPU: the first is asked for
            at = torch.where(d == least[:, None], torch.arange(d.shape[1], device=d.device), d.shape[1]).amin(1)
            nearer = least < best[part]
            best[part] = torch.where(nearer, least, best[part])
            index[part] = torch.where(nearer, at + j, index[part])
    return index


def _among_candidates(x: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """The nearest of the keys that `columns` [M, count] lists; -1 stands for none."""
    ordered = columns.sort(1).values
    index = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    step = max(1, _HELD // max(1, x.shape[1] * ordered.shape[1]))
    for r in range(0, x.shape[0], step):
        listed = ordered[r : r + step]
        d = _distances(x[r : r + step, None], keys[listed.clamp(min=0)])
        d = torch.where(listed >= 0, d, torch.inf)
        first = torch.where(d == d.amin(1, keepdim=True), listed, keys.shape[0]).amin(1)
        index[r : r + step] = first
    return index


@kernel("nearest_key", "reference")
@torch.no_grad()
def _nearest_key(x: Tensor, keys: Tensor) -> Tensor:
    """The largest <x, k> - |k|^2 / 2 by `row_topk`, of numbers from which the keys' mean is taken off first; float64 for
    what its rounding leaves open.

    Rounding: of differences, products, sums of D + 1 terms and the norm, at most (D + 8) u (|x| + |k|) |k| in all, and
    what products below the smallest normal number lose.
    """
    rows, width = x.shape
    finite_rows, valid = x.isfinite().all(1), keys.isfinite().all(1)
    if rows == 0 or not bool(valid.any()):
        return torch.full((rows,), -1, dtype=torch.int64, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    a = torch.where(finite_rows[:, None], x, 0.0).to(wide)
    k = torch.where(valid[:, None], keys, 0.0).to(wide)
    middle = k.mean(0)
    centred_a, centred_k = (a - middle).float(), (k - middle).float()
    norms = centred_k.double().square().sum(1)
    scores = row_topk(
        torch.cat((centred_a, centred_a.new_ones(rows, 1)), 1),
        torch.cat((centred_k, (-norms / 2).float()[:, None]), 1),
        min(_CANDIDATES, keys.shape[0]), positive=None, column_valid=valid,
    )  # fmt: skip
    longest = torch.where(valid, norms, 0.0).amax().sqrt()
    unit, tiny = torch.finfo(torch.float32).eps / 2, torch.finfo(torch.float32).tiny
    bound = (width + 8) * (unit * (centred_a.double().square().sum(1).sqrt() + longest) * longest + tiny)
    # A score further below the best than both may err belongs to no nearest key; where something overflowed, none does.
    below = scores.values[:, :1] - scores.values > 2 * bound[:, None]
    complete = bound.isfinite() & ((scores.columns[:, -1] < 0) | (keys.shape[0] <= _CANDIDATES))  # all keys are listed
    index = scores.columns[:, 0].clone()
    decided = below[:, 1] if below.shape[1] > 1 else complete
    listed = below[:, -1] | complete
    some = (listed & ~decided & finite_rows).nonzero()[:, 0]
    if some.numel():
        index[some] = _among_candidates(a[some], k, scores.columns[some])
    some = (~listed & ~decided & finite_rows).nonzero()[:, 0]
    if some.numel():
        index[some] = _among_all(a[some], k, valid)
    return torch.where(finite_rows, index, -1)
