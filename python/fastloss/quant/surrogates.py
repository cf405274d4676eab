"""Surrogates: the function F whose derivative stands for that of sign in the backward of `binarize` (docs/design.md,
"binarize").

`binarize(x, "clip")` takes a surrogate by its name, with its usual numbers; `binarize(x,
surrogates.reste(power=2.0))` with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .checks import surrogate_numbers
from .contract import Surrogate


class SurrogateFunction(NamedTuple):
    """A surrogate with its two numbers, as the kernels take it."""

    kind: Surrogate
    p0: float = 0.0
    p1: float = 0.0


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def identity() -> SurrogateFunction:
    """Slope 1 everywhere: the plain straight-through estimator."""
    return SurrogateFunction(Surrogate.IDENTITY, 0.0, 0.0)


def clip(limit: float = 1.0) -> SurrogateFunction:
    """Slope 1 where |u| < limit, else 0: F = hardtanh. BNN; the usual choice."""
    return SurrogateFunction(Surrogate.CLIP, _positive("limit", limit), 0.0)


def approx() -> SurrogateFunction:
    """Slope max(0, 2 - 2 |u|): F = 2u - u |u| on [-1, 1]. Bi-Real Net, ReActNet, activations of BiPer and ReCU."""
    return SurrogateFunction(Surrogate.APPROX, 0.0, 0.0)


def reste(power: float = 3.0, limit: float = 1.5) -> SurrogateFunction:
    """F = sign(u) |u|^(1 / power) on 0.1 < |u| <= limit, a line through 0 within, constant outside.

    "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks
    Training"; the
    power rises from 1 to 3 over the training (`reste_power`).
    """
    if not power >= 1:
        raise ValueError(f"power must be at least 1, got {power}")
    return SurrogateFunction(Surrogate.RESTE, _positive("power", power), _positive("limit", limit))


def reste_power(progress: float, end: float = 3.0) -> float:
    """ReSTE's power at a share `progress` in [0, 1] of the training: 1 + (1 - cos(pi/2 progress)) (end - 1)."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return 1 + (1 - math.cos(math.pi / 2 * progress)) * (end - 1)


def biper(frequency: float = 20.0) -> SurrogateFunction:
    """The bit is the sign of sin(frequency u), F = sin(frequency u). "BiPer: Binary Neural Networks using a Periodic
    Function"."""
    return SurrogateFunction(Surrogate.BIPER, _positive("frequency", frequency), 0.0)


def swish(sharpness: float = 5.0) -> SurrogateFunction:
    """F = 2 s (1 + b u (1 - s)) - 1, s = sigmoid(b u), b = sharpness: SignSwish of BNN+."""
    return SurrogateFunction(Surrogate.SWISH, _positive("sharpness", sharpness), 0.0)


def fda(frequency: float = 0.1, terms: int = 9) -> SurrogateFunction:
    """F = (4 / pi) sum_{i=0..terms} sin((2i + 1) w u) / (2i + 1) on |u| <= 1, w = frequency: the Fourier series of a
    square wave.

    The operator of FDA-BNN in "BiBench: Benchmarking and Analyzing Network Binarization"; its noise adaptation is
    left out.
    """
    if terms != int(terms) or not 0 <= terms <= 1000:
        raise ValueError(f"terms must be an integer in 0..1000, got {terms}")
    return SurrogateFunction(Surrogate.FDA, _positive("frequency", frequency), float(terms))


#: What `binarize` takes by name. The usual numbers are written again: those of a call are constants to torch.compile,
#: while it makes defaults symbols with dynamic=True, which two autograd functions of one graph cannot share.
BY_NAME: dict[str, Callable[[], SurrogateFunction]] = {
    "identity": identity, "clip": lambda: clip(1.0), "approx": approx, "bireal": approx, "react": approx,
    "reste": lambda: reste(3.0, 1.5), "biper": lambda: biper(20.0), "swish": lambda: swish(5.0), "fda": lambda: fda(0.1, 9),
}  # fmt: skip


def surrogate_of(surrogate: str | SurrogateFunction) -> SurrogateFunction:
    """A surrogate by its name, or as it is. ValueError for a name that is not known, or numbers that are not taken."""
    if isinstance(surrogate, SurrogateFunction):
        surrogate_numbers(*surrogate)
        return surrogate
    if surrogate not in BY_NAME:
        raise ValueError(f"surrogate must be one of {', '.join(BY_NAME)} or a SurrogateFunction, got {surrogate!r}")
    return BY_NAME[surrogate]()
