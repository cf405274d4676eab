"""From a user's words to a `Pairing`: temperatures, norms, windows and masks, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import can_look
from .classes import Diagonal, Guide, PairMask, PairSets, SameId, members
from .pairing import Pairing

Temperature = float | Tensor
#: As in torch.nn.functional.normalize.
EPS = 1e-12
INF = float("inf")  # compared with: math.isfinite would break a graph whose numbers are symbols


class Made(NamedTuple):
    """A pairing, and what `pair_stats` takes beside it."""

    pairing: Pairing
    boost: Tensor | None
    margin: Tensor | None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product of x runs in: autocast's where that is on."""
    try:
        on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    except RuntimeError:  # a device type without autocast, such as meta
        on = False
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def check_embeddings(q: Tensor, k: Tensor) -> None:
    """Raise for embeddings that are not [M, D] and [N, D] of one floating dtype on one device."""
    if q.dim() != 2 or k.dim() != 2:
        raise ValueError(f"embeddings must be [M, D] and [N, D], got {list(q.shape)} and {list(k.shape)}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"embeddings must have one dimension D, got {list(q.shape)} and {list(k.shape)}")
    if not q.is_floating_point() or not k.is_floating_point():
        raise TypeError(f"embeddings must be floating, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"embeddings must be on one device, got {q.device} and {k.device}")


def number(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device. A number is filled in, not copied: a copy would make the host wait for the GPU."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if isinstance(value, (str, list, tuple)):
        raise TypeError(f"expected a number or a tensor, got {value!r}")
    return torch.full((), value, dtype=dtype, device=device)


def vector(name: str, value: Tensor | float, length: int, q: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or [length] as [length]."""
    x = value if isinstance(value, Tensor) else number(value, dtype, q.device)
    if x.device != q.device and x.dim():
        raise ValueError(f"{name} is on {x.device}, the embeddings on {q.device}")
    if x.dim() > 1 or (x.dim() == 1 and x.shape[0] not in (1, length)):
        raise ValueError(f"{name} must be a number, or a tensor [] or [{length}]; got {list(x.shape)}")
    return x.to(device=q.device, dtype=dtype).expand(length)


def positive_numbers(name: str, value: Tensor | float) -> None:
    """Raise ValueError for a temperature that is 0 or negative, where looking costs no wait for a device."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        if can_look(value) and bool((value <= 0).any()):
            raise ValueError(f"{name} must be > 0, got {float(value.detach().min())}")
    elif value is None or isinstance(value, (str, tuple, list)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    elif not 0 < value < INF:
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def _valid(name: str, valid: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    if valid is None:
        return None
    if valid.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(valid.shape)}")
    if valid.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{name} must be torch.bool or torch.uint8, got {valid.dtype}")
    if valid.device != device:
        raise ValueError(f"{name} is on {valid.device}, the embeddings on {device}")
    return valid.to(torch.uint8)


def _inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype).clamp_min(EPS).reciprocal()


def _zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """x with zeros in rows that are not valid, so that their norms have a gradient."""
    return x if valid is None else x.masked_fill((valid == 0)[:, None], 0.0)


def make_pairing(
    q: Tensor, k: Tensor | None, scale: Temperature, column_scale: Tensor | None, positive: PairSets, excluded: PairSets,
    row_valid: Tensor | None, column_valid: Tensor | None,
    window: tuple[Tensor | float | None, Tensor | float | None] | None, guide: Guide | None, normalize: bool,
    hardness: float = 0.0, margin: float | Tensor | None = None,
) -> Made:  # fmt: skip
    """The fields of the pair contract from a user's arguments; see `pair_stats` for what they mean."""
    own = k is None
    k = q if k is None else k
    check_embeddings(q, k)
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        raise TypeError(f"window must be (low, high), got {window!r}")
    if autocast_dtype(q) != autocast_dtype(k):
        raise TypeError(f"embeddings must have one dtype, got {q.dtype} and {k.dtype}")
    (m, n), device = (q.shape[0], k.shape[0]), q.device
    if own:
        if column_valid is not None or column_scale is not None:
            raise ValueError("without k the columns are the rows: pass row_valid, and no column_scale")
        column_valid = row_valid
        given = (
            () if excluded is None else (excluded,) if isinstance(excluded, (Diagonal, SameId, PairMask)) else excluded
        )
        excluded = (Diagonal(0), *given)
    positive_numbers("scale", scale)
    rows_valid, columns_valid = (
        _valid("row_valid", row_valid, m, device),
        _valid("column_valid", column_valid, n, device),
    )
    dtype = torch.promote_types(autocast_dtype(q), torch.float32)
    row_scale = user_scale = vector("scale", scale, m, q, dtype)
    columns = None
    if column_scale is not None:
        positive_numbers("column_scale", column_scale)
        if window is not None or hardness:
            raise ValueError("window and hardness are in units of similarities: they take no column_scale")
        columns = vector("column_scale", column_scale, n, q, dtype)
    q = q.to(autocast_dtype(q))
    k = q if own else k.to(autocast_dtype(k))
    if normalize:
        q = _zero_invalid(q, rows_valid)
        k = q if own else _zero_invalid(k, columns_valid)
        inverse = _inverse_norm(q, dtype)
        inverse_k = inverse if own else _inverse_norm(k, dtype)
        row_scale = user_scale * inverse
        columns = inverse_k if columns is None else columns * inverse_k
    low, high = (None, None) if window is None else window
    fixed = user_scale.detach()
    if not -INF < hardness < INF:
        raise ValueError(f"hardness must be finite, got {hardness}")

    def bound(name: str, value: Tensor | float | None) -> Tensor | None:
        return None if value is None else (vector(name, value, m, q, dtype).detach() * fixed).contiguous()

    limit = None
    if guide is not None:
        if guide.q.dtype != guide.k.dtype:
            raise TypeError(f"guides must have one dtype, got {guide.q.dtype} and {guide.k.dtype}")
        if guide.q.shape[:1] != (m,) or guide.k.shape[:1] != (n,) or guide.q.shape[1:] != guide.k.shape[1:]:
            raise ValueError(
                f"guides must be [{m}, E] and [{n}, E], got {list(guide.q.shape)} and {list(guide.k.shape)}"
            )
        limit = vector("guide limit", guide.limit, m, q, dtype).detach().contiguous()
    positives = members("positive", positive, m, n, device)
    exclusions = members("excluded", excluded, m, n, device)
    pairing = Pairing(
        q, k, row_scale.contiguous(), None if columns is None else columns.contiguous(), rows_valid, columns_valid,
        *positives, *exclusions, bound("window low", low), bound("window high", high),
        None if guide is None else guide.q.detach(), None if guide is None else guide.k.detach(), limit,
    )  # fmt: skip
    boost = 1 + hardness / fixed if hardness else None
    margins = None if margin is None else vector("margin", margin, m, q, dtype).detach().contiguous()
    return Made(pairing, boost, margins)
