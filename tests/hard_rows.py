"""The rows that break cross entropy kernels (DESIGN §3), by name."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")
ROWS = (
    "plain", "offset", "one huge", "target huge", "minus inf", "only the target", "all equal", "all ignored", "one class",
    "odd width", "unaligned", "expanded", "confident", "nan", "target minus inf", "very low",
)  # fmt: skip


def hard_rows(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logits, target) of a few rows of that kind."""
    n, v = 4, {"one class": 1, "odd width": 4099}.get(name, 130)
    z = torch.randn(n, v) * 2
    y = torch.randint(0, v, (n,))
    rows = torch.arange(n)
    if name == "offset":
        z += 1e4 if dtype != torch.float16 else 1e3
    elif name == "one huge":
        z[:, 7] = 500.0
        y[:] = 3
    elif name == "target huge":
        z[rows, y] = 500.0
    elif name == "minus inf":
        z[:, ::3] = -INF
        y[:] = 4
    elif name == "only the target":
        z[:] = -INF
        z[rows, y] = 1.0
    elif name == "all equal":
        z[:] = 3.0
    elif name == "all ignored":
        y[:] = -100
    elif name == "confident":
        for i, p in enumerate((0.9, 0.99, 0.999, 0.9999)):
            others = z[i].clone()
            others[y[i]] = -INF
            z[i, y[i]] = others.logsumexp(0) + torch.tensor(p / (1 - p)).log()
    elif name == "nan":
        z[1, 5] = float("nan")
    elif name == "target minus inf":
        z[rows, y] = -INF
    elif name == "very low":
        z -= 200.0
    z = z.to(dtype)
    if name == "unaligned":
        return torch.cat([z[:, :1], z], 1)[:, 1:], y
    if name == "expanded":
        return z[:1].expand(n, v), y
    return z, y
