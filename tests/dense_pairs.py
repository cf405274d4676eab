"""What pair_stats, pair_map and pair_histogram should say, from the dense matrix by torch's own functions; and problems that
use every feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import Diagonal, Guide, PairMask, PairStats, SameId

INF = float("inf")
_DIAGONAL = Diagonal(0)


#: What a loss is made of.
ROWS_AND_COLUMNS = [
    side + name for side in ("", "columns.") for name in ("neg_lse", "pos_lse", "lse", "nll", "pos_sum")
]


def equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Equal up to `tolerance`, relative and absolute; NaN is NaN."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def mask_of(sets: Any, m: int, n: int) -> Tensor:
    """bool [M, N] of a union of classes."""
    found = torch.zeros(m, n, dtype=torch.bool)
    for s in () if sets is None else sets if isinstance(sets, (tuple, list)) else (sets,):
        if isinstance(s, Diagonal):
            for offset in s.offsets:
                found |= torch.arange(n) - torch.arange(m)[:, None] == offset
        elif isinstance(s, SameId):
            found |= s.rows[:, None] == (s.rows if s.columns is None else s.columns)
        else:
            found |= s.mask
    return found


def classes(
    q: Tensor, k: Tensor, similarity: Tensor, positive: Any, excluded: Any, row_valid: Tensor | None,
    column_valid: Tensor | None, window: Any, guide: Guide | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(negative, positive) bool [M, N]."""
    m, n = similarity.shape
    allowed = ~mask_of(excluded, m, n)
    if row_valid is not None:
        allowed &= row_valid[:, None]
    if column_valid is not None:
        allowed &= column_valid
    own = mask_of(positive, m, n) & allowed
    others = allowed & ~own
    if window is not None:
        low, high = (torch.as_tensor(b, dtype=similarity.dtype).expand(m)[:, None] for b in window)
        others &= (similarity >= low) & (similarity <= high)
    if guide is not None:
        limit = torch.as_tensor(guide.limit, dtype=torch.float64).expand(m)[:, None]
        others &= ~(guide.q.double() @ guide.k.double().t() > limit)
    return others, own


def _lse(z: Tensor, member: Tensor, dim: int) -> Tensor:
    some = member.any(dim, keepdim=True)
    value = torch.logsumexp(torch.where(some, z.masked_fill(~member, -INF), 0.0), dim)
    return torch.where(some.squeeze(dim), value, -INF)


def _max(z: Tensor, member: Tensor, dim: int) -> Tensor:
    return z.detach().masked_fill(~member, -INF).amax(dim)


def dense_stats(
    q: Tensor, k: Tensor, *, scale: Any = 1.0, column_scale: Tensor | None = None, bias: Any = None,
    positive: Any = _DIAGONAL, excluded: Any = None, row_valid: Tensor | None = None,
    column_valid: Tensor | None = None, window: Any = None, guide: Guide | None = None, hardness: float = 0.0,
    margin: Any = None, second_scale: float | None = None, mean: bool = False, normalize: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Every property of `PairStats`, those of the columns as "columns.<name>"."""
    if normalize:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    s = q @ k.t()
    z = torch.as_tensor(scale, dtype=s.dtype).expand(len(q))[:, None] * s
    z = z if column_scale is None else z * column_scale
    z = z if bias is None else z + bias
    negative, own = classes(q, k, s.detach(), positive, excluded, row_valid, column_valid, window, guide)
    below = z + hardness * s.detach()
    above = z if margin is None else z - torch.as_tensor(margin, dtype=s.dtype).expand(len(q))[:, None]
    out = {}
    for prefix, dim in (("", 1), ("columns.", 0)):
        lses = {"neg_lse": _lse(below, negative, dim), "pos_lse": _lse(above, own, dim)}
        both = torch.where(negative, below, above)
        out |= {prefix + name: value for name, value in lses.items()}
        out |= {
            prefix + "lse": _lse(both, negative | own, dim),
            prefix + "nll": torch.where(own.any(dim), _lse(both, negative | own, dim) - lses["pos_lse"], 0.0),
            prefix + "neg_max": _max(below, negative, dim), prefix + "pos_max": _max(above, own, dim),
            prefix + "pos_sum": torch.where(own, above, 0.0).sum(dim),
            prefix + "pos_mean": torch.where(own, above, 0.0).sum(dim) / own.sum(dim).clamp(min=1),
            prefix + "neg_count": negative.sum(dim), prefix + "pos_count": own.sum(dim),
        }  # fmt: skip
    if mean:
        some = negative.any(1, keepdim=True)
        share = torch.where(some, below.masked_fill(~negative, -INF), 0.0).softmax(1) * negative
        out["neg_mean"] = (share * below).sum(1)
    if second_scale is not None:
        out["second_neg_lse"] = _lse(second_scale * below, negative, 1)
    return out


def values(stats: PairStats, names: Any) -> dict[str, Tensor]:
    """The same dictionary of ours."""

    def one(name: str) -> Tensor:
        side, _, last = name.rpartition(".")
        return getattr(stats.columns if side else stats, last)

    return {name: one(name) for name in names}


def weighted(found: dict[str, Tensor], seed: int = 0) -> Tensor:
    """One number of all statistics, each with a weight of its own; an empty set counts 0."""
    g = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(found):
        x = found[name].double()
        weight = torch.randn(x.shape, generator=g, dtype=torch.float64)
        total = total + (weight * x.masked_fill(x.detach() == -INF, 0.0)).sum()
    return total


def _random(seed: int) -> tuple[Callable[..., Tensor], torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    return (lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)), g


def features(m: int, n: int, d: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Arguments by the feature that they use, for q [m, d] and k [n, d]. What is trained is a leaf that wants a gradient."""
    normal, g = _random(seed)
    rows, columns = (torch.randint(0, 3, (count,), generator=g) for count in (m, n))
    mask = torch.rand(m, n, generator=g) < 0.3
    row_valid, column_valid = (torch.rand(count, generator=g) < 0.7 for count in (m, n))

    def trained(x: Tensor) -> Tensor:
        return x.requires_grad_()

    return {
        "plain": {},
        "trained scale": {"scale": trained(torch.tensor(1.5, dtype=torch.float64))},
        "scale of each row": {"scale": trained(normal(m).exp())},
        "scale of each column": {"scale": 0.7, "column_scale": trained(normal(n).exp())},
        "bias": {"bias": trained(torch.tensor(-0.3, dtype=torch.float64)), "second_scale": 2.0, "mean": True},
        "normalize": {"normalize": True, "scale": trained(torch.tensor(3.0, dtype=torch.float64))},
        "same id": {"positive": SameId(rows, columns), "excluded": Diagonal(0)},
        "mask": {"positive": PairMask(mask), "excluded": (Diagonal(1), SameId(rows, columns))},
        "diagonals": {"positive": Diagonal(0, 1), "excluded": Diagonal(-1)},
        "no positive": {"positive": None},
        "no negative": {"excluded": PairMask(~mask_of(Diagonal(0), m, n))},
        "nothing": {"excluded": PairMask(torch.ones(m, n, dtype=torch.bool))},
        "valid": {"row_valid": row_valid, "column_valid": column_valid},
        "valid, normalize": {"row_valid": row_valid, "column_valid": column_valid, "normalize": True},
        "window": {"window": (-1.1, normal(m).abs() + 0.3)},
        "guide": {"guide": Guide(normal(m, 4), normal(n, 4), 0.5)},
        "margin": {"margin": normal(m).abs()},
        "mean and second": {"mean": True, "second_scale": 0.5},
        "everything": {
            "scale": trained(normal(m).exp()), "bias": trained(torch.tensor(0.2, dtype=torch.float64)),
            "normalize": True, "positive": (SameId(rows, columns), Diagonal(2)), "excluded": PairMask(mask),
            "row_valid": row_valid, "column_valid": column_valid, "window": (-0.8, 0.9),
            "guide": Guide(normal(m, 4), normal(n, 4), normal(m)), "margin": 0.1, "mean": True, "second_scale": 1.5,
        },
    }  # fmt: skip


#: hardness gives the value a boost and the slope none, which finite differences cannot follow: not for gradcheck.
HARDNESS: dict[str, dict[str, Any]] = {"hardness": {"hardness": 0.8, "scale": 2.0, "normalize": True}}
FEATURES = tuple(features(2, 2, 2))


def trained(arguments: dict[str, Any]) -> list[str]:
    """The names of the arguments that want a gradient."""
    return [name for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad]


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The floating tensors of a problem in another dtype, again leaves."""

    def one(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, Guide):
            return Guide(one(x.q), one(x.k), one(x.limit))
        return tuple(one(v) for v in x) if isinstance(x, tuple) else x

    return {name: one(x) for name, x in arguments.items()}
