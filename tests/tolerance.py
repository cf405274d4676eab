"""The one tolerance rule (DESIGN §3): our error against fp64 may not exceed torch's own by more than rounding.

|ours - ref64| <= 1.25 |torch same dtype - ref64| + k eps scale(row), with scale the largest reference value of the row;
and, on gradients, relative L2, direction, and no row that should move is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 4.0


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(-1, 1)


def check_close(ours: Tensor, torch_result: Tensor, ref64: Tensor, dtype: torch.dtype, k: float = K) -> None:
    """`ours` is as accurate as `torch_result` of the same dtype, up to k units of rounding of the row's scale."""
    a, b, r = (_rows(t.detach().double()) for t in (ours, torch_result, ref64))
    assert a.shape == r.shape, f"shape {tuple(ours.shape)}, expected {tuple(ref64.shape)}"
    same = (a == r) | (a.isnan() & r.isnan())
    scale = torch.nan_to_num(r, 0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)
    info = torch.finfo(dtype)
    allowed = 1.25 * (b - r).abs() + k * info.eps * (scale + info.tiny)  # below tiny, numbers have a fixed spacing
    bad = ~(same | ((a - r).abs() <= allowed))
    if bad.any():
        i, j = (int(t) for t in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} wrong; first at [{i}, {j}]: ours {a[i, j]:.9g}, torch {b[i, j]:.9g}, "
            f"fp64 {r[i, j]:.9g}, allowed error {float(torch.nan_to_num(allowed)[i, j]):.3g}"
        )


def check_gradient(ours: Tensor, torch_result: Tensor, ref64: Tensor, dtype: torch.dtype, k: float = K) -> None:
    """check_close, and the aggregate checks that an elementwise tolerance lets through."""
    check_close(ours, torch_result, ref64, dtype, k)
    a, b, r = (t.detach().double() for t in (ours, torch_result, ref64))
    if not r.isfinite().all() or r.norm() == 0:
        return
    ours_error, torch_error = (a - r).norm() / r.norm(), (b - r).norm() / r.norm()
    assert ours_error <= 1.25 * torch_error + k * torch.finfo(dtype).eps, f"relative L2 {ours_error:.3g}"
    ours_direction, torch_direction = (
        torch.nn.functional.cosine_similarity(t.flatten(), r.flatten(), 0) for t in (a, b)
    )
    assert ours_direction >= min(1 - 1e-3, torch_direction - 1e-3), f"cosine {ours_direction:.6f}"
    rows = _rows(r)
    largest = rows.abs().amax(-1)
    moves = (largest > 1e-3 * rows.abs().max()) & (largest > torch.finfo(dtype).tiny)
    assert (_rows(a).abs().amax(-1)[moves] > 0).all(), "a row that should move is zero"
