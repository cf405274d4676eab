"""What losses in margin form share: functions whose derivatives keep their digits too, and checks of parameters.

With d = z_y - LSE of the other columns: log p = logsigmoid(d), log(1 - p) = logsigmoid(-d), p = e^(log p) and
1 - p = e^(log(1 - p)). Nothing is ever 1 minus a probability, so nothing cancels at p -> 1 and nothing is lost at p -> 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..autograd import functorch_active
from ..statistics import RowStats


def counted(stats: RowStats, rows: Tensor) -> Tensor:
    """`rows`, with value and gradient 0 where the row's target is ignored."""
    return rows if stats.target is None else torch.where(stats.valid, rows, 0.0)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, whose derivative is e^x: torch's own is (e^x - 1) + 1, which is 0 in float32 from x = -17 down."""
    grown = x.exp()
    return torch.expm1(x.detach()) + (grown - grown.detach())


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0; -inf at 0."""
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def power(exponent: float | Tensor, log_base: Tensor) -> Tensor:
    """base^exponent, 0^0 = 1, from log base <= 0 that may be -inf."""
    if isinstance(exponent, Tensor):
        log_base = torch.where(exponent == 0, 0.0, log_base)
    elif exponent == 0:
        return torch.ones_like(log_base)
    return torch.exp(exponent * log_base)


def check_above(bound: float, **given: Any) -> None:
    """Raise ValueError for a number that is not > bound. A tensor is not looked at: that would wait for the GPU."""
    for name, value in given.items():
        if not isinstance(value, Tensor) and not value > bound:
            raise ValueError(f"{name} must be > {bound:g}, got {value}")


def check_not_negative(**given: Any) -> None:
    """Raise ValueError for a number that is not >= 0."""
    for name, value in given.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def check_temperature(stats: RowStats, name: str, temperature: float | Tensor) -> None:
    """Raise ValueError if the statistics were made at another temperature; looked at on a CPU only, where it is free."""
    made = stats.temperature
    if made is None:
        raise ValueError(f"the statistics were made without a temperature: pass temperature={name} to row_stats")
    if made.is_cpu and not torch.compiler.is_compiling() and not functorch_active():
        asked = temperature.detach().to(made) if isinstance(temperature, Tensor) else temperature
        asked = asked.reshape(-1) if isinstance(asked, Tensor) else asked
        if not bool((made.detach() == asked).all()):
            raise ValueError(f"the statistics were made at another temperature than {name} = {temperature}")
