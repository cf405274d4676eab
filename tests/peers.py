"""The libraries that fastloss.compat stands in for, and what it takes to compare with them.

Only the files of their losses are executed: what their packages import on the way (vision models, tokenizers) is not
needed, so `pip install --no-deps` of the extra `peers` is enough.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@contextlib.contextmanager
def _modules_restored(*packages: str) -> Iterator[None]:
    def ours(name: str) -> bool:
        return name.split(".")[0] in packages

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [n for n in sys.modules if ours(n)]:
            del sys.modules[name]
        sys.modules.update(before)


def module_of(name: str, stand_ins: dict[str, dict[str, Any]] | None = None) -> types.ModuleType:
    """A module of a package none of whose `__init__` files run; `stand_ins` are modules that hold these names instead
    of theirs. Skips the test where the package is not installed."""
    package = name.split(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: the extra `peers`")
    with _modules_restored(package, *(n.split(".")[0] for n in stand_ins or {})):
        folder = Path(next(iter(spec.submodule_search_locations)))
        for init in (folder, *(p.parent for p in folder.rglob("__init__.py"))):
            bare = types.ModuleType(".".join((package, *init.relative_to(folder).parts)))
            bare.__path__ = [str(init)]
            sys.modules[bare.__name__] = bare
        for stand_in, names in (stand_ins or {}).items():
            module = sys.modules.setdefault(stand_in, types.ModuleType(stand_in))
            module.__dict__.update(names)
        return importlib.import_module(name)


def embeddings(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random leaf."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def check_same(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: Sequence[Tensor], rtol: float = 1e-9
) -> None:
    """Both have one value and one gradient in every input."""
    mine, right = ours(), theirs()
    torch.testing.assert_close(mine, right, rtol=rtol, atol=1e-12)
    grads = [torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (mine, right)]
    for a, b, x in zip(*grads, inputs, strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()) + 1e-13)


def largest_saved(loss: Callable[[], Tensor]) -> int:
    """How many numbers the largest tensor holds that `loss` keeps for its backward."""
    sizes = [0]

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss()
    return max(sizes)
