"""`quantize_groups`, `dequantize_groups`: codes equal to the reference's on every instruction set; the codec's bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: numbers and group: one task, several; groups that begin at no multiple of a vector; more than one task in a group
SHAPES = ((0, 8), (1, 8), (130, 2), (300, 6), (1001, 10), (5000, 2500), (70001, 66000), (40000, 256))
SEED = torch.tensor([0x123456789ABCDEF])

compiled_only = pytest.mark.skipif(_C is None, reason=str(MISSING))


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()  # type: ignore[union-attr]
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")  # type: ignore[union-attr]
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on(backend: str, op: str, *args: Any) -> Any:
    with registry.use_backend(backend):
        return getattr(torch.ops.fastloss, op).default(*args)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def hard(n: int, group: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers with groups of equal ones, a NaN, infinities of both signs, and ties between two codes."""
    x = torch.randn(n).mul(3).to(dtype)
    if n > 4 * group:
        x[group : 2 * group] = 1.25
        x[2 * group : 3 * group] = torch.arange(group).to(dtype) / 2
        x[3 * group] = math.nan
        x[-group] = math.inf
        x[-1] = -math.inf
    return x


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(isa: int, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    n, group = shape
    x, low = hard(n, group, dtype), torch.tensor([-1.0, 0.5, -3.0])
    for seed in (None, SEED):
        for given in ((None, None), (low, low + torch.tensor([2.0, 0.0, 5.0])), (low, low - 1)):
            args = (x, group, bits, *given, seed)
            made, wanted = (on(backend, "quantize_groups", *args) for backend in ("cpp", "reference"))
            assert made[0].shape == (-(-n // group), group * bits // 8)
            assert torch.equal(made[0], wanted[0]) and same(made[1], wanted[1]) and same(made[2], wanted[2])
            for to in (dtype, torch.float32):
                back = (*made, n, group, bits, to)
                assert same(on("cpp", "dequantize_groups", *back), on("reference", "dequantize_groups", *back))


@compiled_only
def test_one_nan_anywhere_makes_its_group_nan(isa: int) -> None:
    for n, group in ((200, 40), (70001, 66000)):
        for at in (0, 1, 39, 40, 77, n - 1):
            x = torch.randn(n)
            x[at] = math.nan
            made = on("cpp", "quantize_groups", x, group, 8, None, None, None)
            back = on("cpp", "dequantize_groups", *made, n, group, 8, torch.float32)
            wrong = torch.arange(n) // group == at // group
            assert torch.equal(back.isnan(), wrong) and made[0][at // group].eq(0).all()


@compiled_only
@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "stochastic"])
def test_codes_do_not_depend_on_threads(isa: int, seed: Tensor | None, threads: None) -> None:
    x = torch.randn(100001)
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(on("cpp", "quantize_groups", x, 250, 4, None, None, seed))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("stochastic", [False, True])
def test_bounds(bits: int, stochastic: bool) -> None:
    """|x' - x| <= range / 510 to the nearest of 256 levels (range / 30 of 16), and twice that where rounding is by chance."""
    group, x = 64, torch.randn(100, 64) * torch.logspace(-6, 6, 100)[:, None] + torch.randn(100, 1)
    codes, low, step = torch.ops.fastloss.quantize_groups(
        x.reshape(-1), group, bits, None, None, SEED if stochastic else None
    )
    back = torch.ops.fastloss.dequantize_groups(codes, low, step, x.numel(), group, bits, torch.float32).reshape(
        100, 64
    )
    span = (x.amax(1) - x.amin(1)).double()
    bound = span / (2**bits - 1) / (1 if stochastic else 2)
    error = (back.double() - x.double()).abs().amax(1)
    rounding = 4 * torch.finfo(torch.float32).eps * (x.abs().amax(1).double() + span)
    assert (error <= bound + rounding).all()
    assert (
        error >= bound * (0.8 if stochastic else 0.7)
    ).float().mean() > 0.5  # the bound is no larger than it has to be


def test_rounding_by_chance_has_no_bias() -> None:
    """The mean of 4000 draws is x within 5 of its deviations, and the deviation is that of a Bernoulli number."""
    draws, x = 4000, torch.linspace(0, 1, 64) ** 2
    many = x.repeat(draws)
    codes, low, step = torch.ops.fastloss.quantize_groups(many, 64, 4, None, None, torch.tensor([7]))
    back = torch.ops.fastloss.dequantize_groups(codes, low, step, many.numel(), 64, 4, torch.float32).reshape(draws, 64)
    part = (x.double() * 15) % 1
    deviation = (part * (1 - part)).sqrt() / 15
    assert ((back.double().mean(0) - x).abs() <= 5 * deviation / math.sqrt(draws) + 1e-6).all()
    often = (part - 0.5).abs() < 0.4
    torch.testing.assert_close(back.double().std(0)[often], deviation[often], rtol=0.1, atol=0.0)
    other = torch.ops.fastloss.quantize_groups(many, 64, 4, None, None, torch.tensor([8]))[0]
    assert not torch.equal(codes, other)
    assert torch.equal(codes, torch.ops.fastloss.quantize_groups(many, 64, 4, None, None, torch.tensor([7]))[0])


@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "stochastic"])
def test_beyond_given_ranges_codes_are_clamped(seed: Tensor | None) -> None:
    """Mesa's kernel let them wrap around: the largest number became the smallest."""
    x = torch.tensor([-1e30, -5.0, -1.0, 0.0, 1.0, 5.0, 300.0, 1e30, math.inf, -math.inf])
    args = (x, 10, 8, torch.tensor([-1.0]), torch.tensor([1.0]), seed)
    codes, low, step = torch.ops.fastloss.quantize_groups(*args)
    got = torch.ops.fastloss.dequantize_groups(codes, low, step, 10, 10, 8, torch.float32)
    wanted = x.clamp(-1, 1)
    assert (got - wanted).abs().max() <= 1 / 255 * (1 if seed is None else 2) + 1e-6
    assert got[-1] == -1 and torch.allclose(got[5:9], torch.ones(4))


def test_what_a_kernel_does_not_take_the_reference_does() -> None:
    x = torch.randn(30, dtype=torch.float64)
    assert "float64" in fastloss.explain("quantize_groups", x, 6, 8, None, None, None)
    assert torch.ops.fastloss.quantize_groups(x, 6, 8, None, None, None)[0].shape == (5, 6)
