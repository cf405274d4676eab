"""sign with the gradient of each surrogate's declared function F, by autograd of F: what the layers are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _reste(u: Tensor, power: float = 3.0, limit: float = 1.5) -> Tensor:
    a = u.abs()
    line, curve = u * 0.1 ** (1 / power) / 0.1, u.sign() * a.clamp(0.1).pow(1 / power)
    edge = limit ** (1 / power)
    return torch.where(a <= 0.1, line, torch.where(a <= limit, curve, edge * u.sign()))


def _swish(u: Tensor, b: float = 5.0) -> Tensor:
    s = torch.sigmoid(b * u)
    return 2 * s * (1 + b * u * (1 - s)) - 1


def _fda(u: Tensor, w: float = 0.1, n: int = 9) -> Tensor:
    c = u.clamp(-1, 1)
    return 4 / math.pi * sum(torch.sin((2 * i + 1) * w * c) / (2 * i + 1) for i in range(n + 1))


#: F by name, with the numbers that a name stands for.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "clip": lambda u: u.clamp(-1, 1),
    "approx": lambda u: 2 * u.clamp(-1, 1) - u.clamp(-1, 1) * u.clamp(-1, 1).abs(),
    "reste": _reste,
    "biper": lambda u: torch.sin(20.0 * u),
    "swish": _swish,
    "fda": _fda,
}


def signed(u: Tensor, name: str) -> Tensor:
    """sign(u), +1 at 0, with the gradient of F."""
    f = FUNCTIONS[name](u)
    decision = f if name == "biper" else u
    return f + (torch.where(decision >= 0, 1.0, -1.0).to(u.dtype) - f).detach()


def saved_bytes(call: Callable[[], Tensor], *alive: Tensor) -> int:
    """Bytes that autograd saves for the backward of call(), each storage once, without those of `alive`."""
    own = {t.untyped_storage().data_ptr() for t in alive}
    found: dict[int, int] = {}

    def look(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        kept = call()  # alive until all is counted: a freed address may come again
    del kept
    return sum(found.values())
