"""Which kernel runs an op: an ordered list of backends per device, and a reason whenever one cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

#: Backends by preference for each device type. `reference` is plain PyTorch and runs everywhere.
ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpp", "reference"),
}
BACKENDS = ("cuda", "triton", "cpp", "reference")


class BackendError(RuntimeError):
    """The backend that was named cannot run this call; the message holds every backend's reason."""


class Kernel(NamedTuple):
    """One backend's implementation of one op."""

    function: Callable[..., Any]
    why_not: Callable[..., str | None]  # None when the kernel takes these arguments, else the reason


_kernels: dict[str, dict[str, Kernel]] = {}
_defaults: dict[str, tuple[Any, ...]] = {}


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    return backend


# One name for the process, not one a thread: the backward of CUDA tensors runs on autograd's own threads.
_forced: str | None = _known(env) if (env := os.environ.get("FASTLOSS_BACKEND")) else None


def kernel(
    op: str, backend: str, why_not: Callable[..., str | None] = lambda *args: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `backend`'s implementation of `op`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _kernels.setdefault(op, {})[_known(backend)] = Kernel(function, why_not)
        return function

    return register


def declare(op: str, defaults: tuple[Any, ...]) -> None:
    """Remember an op's argument defaults: the dispatcher leaves trailing defaults out of a call."""
    _defaults[op] = defaults


def complete(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the defaults behind them."""
    return args + _defaults.get(op, ())[len(args) :]


def forced() -> str | None:
    """The backend named by `use_backend`, or by FASTLOSS_BACKEND when fastloss was imported; or None."""
    return _forced


def _find(op: str, args: tuple[Any, ...]) -> tuple[str, Kernel]:
    name, table = _forced, _kernels.get(op, {})
    for backend in (name,) if name else ORDER.get(args[0].device.type, ("reference",)):
        entry = table.get(backend)
        if entry is not None and entry.why_not(*args) is None:
            return backend, entry
    asked = f" (asked for {name!r})" if name else ""
    raise BackendError(f"no backend can run {op}{asked}:\n{_reasons(op, args)}")


def choose(op: str, *args: Any) -> str:
    """The name of the backend that `op` would run on. args[0] is a tensor and names the device.

    Raises BackendError when the backend that was named cannot take these arguments.
    """
    return _find(op, complete(op, args))[0]


def able(op: str, *args: Any) -> bool:
    """Whether some backend, or the one that was named, can run `op` on args."""
    try:
        _find(op, args)
    except BackendError:
        return False
    return True


def run(op: str, *args: Any) -> Any:
    """Run `op` on the first backend that takes `args`."""
    args = complete(op, args)
    return _find(op, args)[1].function(*args)


def _reasons(op: str, args: tuple[Any, ...]) -> str:
    rows = []
    for backend in BACKENDS:
        entry = _kernels.get(op, {}).get(backend)
        reason = "has no such kernel" if entry is None else entry.why_not(*args)
        rows.append(f"  {backend:10s} {'ok' if reason is None else reason}")
    return "\n".join(rows)


def explain(op: str, *args: Any) -> str:
    """One line per backend: `ok`, or why it cannot run `op` on `args`; and which one is chosen.

    >>> print(fastloss.explain("row_stats", logits, target))  # doctest: +SKIP
    """
    if op not in _kernels:
        raise ValueError(f"unknown op {op!r}: one of {', '.join(sorted(_kernels))}")
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"explain({op!r}, ...) needs the op's arguments, a tensor first; got {args!r}")
    args = complete(op, args)
    try:
        chosen = choose(op, *args)
    except BackendError:
        chosen = "none"
    return f"{op} on {args[0].device}: {chosen}\n{_reasons(op, args)}"


def backends(op: str) -> tuple[str, ...]:
    """The backends that implement `op`."""
    return tuple(b for b in BACKENDS if b in _kernels.get(op, {}))


def ops() -> tuple[str, ...]:
    """The names of all ops that PyTorch knows. Kernels beyond them are shortcuts that only eager calls take."""
    return tuple(op for op in _kernels if op in _defaults)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in the block on the backend `name`, or raise BackendError with every backend's reason.

    Read at run time, so it also holds inside compiled graphs. It holds for the whole process, whatever the thread.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before
