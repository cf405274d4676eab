"""Every bit op: registered as PyTorch wants it, never writing what it was given, and every backend as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastloss import quant, registry
from fastloss.quant import selftest


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(7, 100, generator=g).to(dtype), torch.randn(9, 100, generator=g).to(dtype)


def copies(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def test_the_selftest_knows_every_op() -> None:
    assert quant and set(selftest.OPS) == {
        op
        for op in registry.ops()
        if registry._kernels[op]["reference"].function.__module__.startswith("fastloss.quant")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", selftest.OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.fastloss, op).default, selftest.arguments(op, *operands(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", selftest.OPS)
def test_backends_agree_and_leave_the_arguments_alone(op: str, dtype: torch.dtype) -> None:
    arguments = selftest.arguments(op, *operands(dtype))
    before = copies(arguments)
    backend = registry.choose(op, *arguments)
    got = registry.run(op, *arguments)
    for a, b in zip(arguments, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    with registry.use_backend("reference"):
        wanted = registry.run(op, *arguments)
    apart = float(selftest._apart(got, wanted))
    assert apart <= 4 * torch.finfo(dtype).eps, backend  # both are rounded


@pytest.mark.parametrize("op", selftest.OPS)
def test_the_same_bits_every_time(op: str) -> None:
    arguments = selftest.arguments(op, *operands(torch.float32))
    runs = [registry.run(op, *arguments) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (runs[0], run)), strict=True):
            assert torch.equal(a, b)
