"""linear_row_stats and its backward of the Triton backend, interpreted, against float64 autograd."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from fastloss.triton_kernels import linear_row_stats as kernels
from fastloss.triton_kernels import row_stats as rows
from torch import Tensor

from triton_reference import (
    ARGMAX,
    ENTROPY,
    SUM,
    SUMSQ,
    TEMPERED,
    Problem,
    check_stats,
    combine,
    expect,
)

EVERYTHING = ENTROPY | SUM | SUMSQ | TEMPERED | ARGMAX
SMALL = kernels.Tile(16, 32, 16, 4, 2)
INF = torch.inf


def operands(n: int, v: int, d: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor | None]:
    return [(torch.randn(n, d) * 0.6).to(dtype), (torch.randn(v, d) * 0.6).to(dtype), torch.randn(v) if bias else None]


def problem(n: int, v: int, want: int, softcap: float = 0.0, hard: bool = True, weighted: bool = True) -> Problem:
    target = torch.randint(0, v, (n,)) if hard else None
    if hard and n > 2:
        target[1] = -100
    return Problem(
        target,
        None,
        torch.rand(v) + 0.1 if weighted else None,
        torch.rand(n) + 0.5,
        want=want,
        softcap=softcap,
        scale=0.7,
    )


def arguments(p: Problem) -> tuple[object, ...]:
    """Those of the linear ops, which take no probabilities."""
    return p.target, p.column_weight, p.temperature, p.ignore_index, p.want, p.scale, p.softcap


def check(x: Tensor, w: Tensor, bias: Tensor | None, p: Problem, k: types.ModuleType = kernels, slack: float = 1.0,
          width: int | None = 48, splits: int = 3, **options: object) -> list[Tensor]:  # fmt: skip
    """Statistics, and the gradients of a random loss of them; returns what the kernels gave."""
    options.setdefault("tile", k.Tile(*SMALL))
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, w, bias)]
    logits = leaves[0] @ leaves[1].T + (0 if bias is None else leaves[2])
    e = expect(logits, p)
    stats, argmax = k.linear_row_stats(x, w, bias, *arguments(p), splits=splits, **options)
    check_stats(stats, argmax, e, p, 4 * slack, logits=1.0)
    _, ignored, _ = p.rows(*logits.shape)
    loss, coef = combine(e, p, torch.randn(7, len(x)) * ~ignored)
    loss.backward()
    coef[:, ignored] = torch.randn(7, 1)  # must not matter
    needs = 3 if bias is None else 7
    ours = k.linear_row_stats_backward(coef, stats, argmax, x, w, bias, *arguments(p), needs, width=width, **options)
    dtypes = x.dtype, w.dtype, torch.float32
    for gradient, leaf, dtype in zip(ours, leaves, dtypes, strict=True):
        if leaf is not None:
            assert gradient.dtype == dtype
            check_product(gradient, leaf.grad, x.dtype, slack)
    return [stats, argmax, *ours]


def check_product(ours: Tensor, ref: Tensor, dtype: torch.dtype, slack: float) -> None:
    """Rounding of the gradient of the logits, carried through a GEMM: relative L2 over all, and no element far off."""
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] * slack
    a = ours.double()
    assert a.isfinite().all()
    assert (a - ref).norm() <= tolerance * ref.norm() + 1e-12, f"relative L2 {(a - ref).norm() / ref.norm():.3g}"
    assert ((a - ref).abs() <= 10 * tolerance * ref.abs().max()).all()
    by_row = ref.reshape(len(ref), -1).abs().amax(1)
    assert (a.reshape(len(ref), -1).abs().amax(1) > 0)[by_row > 1e-2 * ref.abs().max()].all(), (
        "a row that should move is zero"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 7), (17, 70, 16), (33, 65, 40), (3, 200, 50)])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*operands(*shape, dtype), problem(shape[0], shape[1], SUM | ARGMAX))


@pytest.mark.parametrize(
    "want,softcap,bias,hard",
    [
        (0, 0.0, False, True),
        (0, 3.0, True, True),
        (EVERYTHING, 0.0, True, True),
        (EVERYTHING, 3.0, True, False),
        (ENTROPY, 0.0, True, True),
        (SUM, 0.0, False, True),
        (SUMSQ, 3.0, True, True),
        (TEMPERED, 0.0, True, True),
        (ARGMAX, 0.0, False, False),
    ],
)
def test_flags(want: int, softcap: float, bias: bool, hard: bool) -> None:
    check(*operands(19, 71, 24, bias=bias), problem(19, 71, want, softcap, hard, weighted=want != SUM))


def hard_rows(name: str, w: Tensor, bias: Tensor, target: Tensor) -> None:
    """The hard cases of DESIGN §3, made through the bias."""
    if name == "all low":
        bias -= 150
    elif name == "offset":
        bias += 1e4
        bias.round_()
    elif name == "one huge":
        bias[3] = 500.0
    elif name == "-inf":
        bias[5:40] = -INF
        target[(target >= 5) & (target < 40)] = 0
    elif name == "only the target":
        bias[1:] = -INF
        target.zero_()
    elif name == "nearly certain":
        w.mul_(0.01)
        bias.fill_(0.0)
        bias[7] = 24.0
        target.fill_(7)


@pytest.mark.parametrize("name", ["all low", "offset", "one huge", "-inf", "only the target", "nearly certain"])
@pytest.mark.parametrize("want", [0, ENTROPY])
def test_hard_rows(name: str, want: int) -> None:
    x, w, bias = operands(18, 66, 16)
    p = problem(18, 66, want)._replace(scale=1.0)
    hard_rows(name, w, bias, p.target)
    # At an offset of 1e4 a logit x w + b has 3 digits less in fp32, whatever follows: that is the input's, not the sums'.
    check(x, w, bias, p, slack=400.0 if name == "offset" else 1.0)


def test_all_rows_ignored_and_one_class_that_does_not_exist() -> None:
    x, w, bias = operands(18, 40, 16)
    p = problem(18, 40, SUMSQ | ENTROPY)
    everyone = p._replace(target=torch.full((18,), -100))
    stats, _, dx, dw, dbias = check(x, w, bias, everyone)
    assert not any(t.any() for t in (stats, dx, dw, dbias))
    p.target[4] = (1 << 32) + 3
    x[1] = torch.nan  # the ignored row
    stats, argmax = kernels.linear_row_stats(x, w, bias, *arguments(p), tile=SMALL)
    assert stats[2, 4].isnan() and stats[:2, 4].isfinite().all() and (stats[:, 1] == 0).all()
    dx, dw, _ = kernels.linear_row_stats_backward(
        torch.ones(7, 18), stats, argmax, x, w, bias, *arguments(p), 7, tile=SMALL
    )
    assert dx[4].isnan().all() and (dx[1] == 0).all() and dw.isnan().all()
    assert dx[[i for i in range(18) if i != 4]].isfinite().all()


def test_default_tiles() -> None:
    check(*operands(130, 300, 72, torch.float16), problem(130, 300, ENTROPY | SUM, 3.0), tile=None, width=None)
    check(*operands(70, 200, 40, bias=False), problem(70, 200, 0), tile=None, width=None)


def test_strided_operands() -> None:
    x, w, bias = operands(20, 50, 34)
    p = problem(20, 50, 0)
    ours = check(x[:, 1:], w[:, 1:], bias, p)
    same = check(x[:, 1:].contiguous(), w[:, 1:].contiguous(), bias, p)
    assert torch.equal(ours[0], same[0])
    check(x[:1].expand(20, 34), w, bias.expand(2, 50)[1], p)
    with pytest.raises(ValueError, match="w must have stride 1"):
        kernels.linear_row_stats(x, torch.randn(34, 50).T, None, *arguments(p))


def test_tensor_descriptors() -> None:
    check(*operands(33, 65, 40, torch.float16), problem(33, 65, ENTROPY), tma=True)
    check(*operands(33, 65, 40, bias=False), problem(33, 65, 0), tma=True)


def test_bfloat16() -> None:
    check(*operands(17, 70, 32, torch.bfloat16), problem(17, 70, ENTROPY))


def test_small_fp16_gradients_do_not_vanish() -> None:
    """A mean over 1e5 rows: every entry of dz is under fp16's smallest number until it is lifted."""
    x, w, bias = operands(16, 64, 16, torch.float16)
    p = problem(16, 64, 0)._replace(target=torch.randint(0, 64, (16,)))
    stats, argmax = kernels.linear_row_stats(x, w, bias, *arguments(p), tile=SMALL)
    coef = torch.zeros(7, 16)
    coef[0], coef[1] = -1e-7, 1e-7
    total = torch.zeros(64, 16)
    _, empty, dbias = kernels.linear_row_stats_backward(
        coef, stats, argmax, x, w, bias, *arguments(p), 7, tile=SMALL, grad_weight=total
    )
    leaf = w.double().requires_grad_()
    e = expect(x.double() @ leaf.T + bias, p)
    (1e-7 * (e.stats[1] - e.stats[2]).sum()).backward()
    assert empty.numel() == 0
    check_product(total, leaf.grad, torch.float16, 1.0)
    assert dbias.abs().sum() > 0


def test_only_what_is_needed() -> None:
    x, w, bias = operands(17, 40, 16)
    p = problem(17, 40, 0)
    stats, argmax = kernels.linear_row_stats(x, w, bias, *arguments(p), tile=SMALL)
    coef = torch.randn(7, 17)

    def backward(needs: int, **options: object) -> tuple[Tensor, ...]:
        return kernels.linear_row_stats_backward(
            coef, stats, argmax, x, w, bias, *arguments(p), needs, tile=SMALL, **options
        )

    whole = backward(7)
    for needs in (1, 2, 4):
        for bit, (ours, expected) in enumerate(zip(backward(needs), whole, strict=True)):
            assert torch.equal(ours, expected) if needs == 1 << bit else ours.numel() == 0
    total = torch.ones(40, 16)
    assert backward(2, grad_weight=total, width=32)[1].numel() == 0
    torch.testing.assert_close(total, 1 + whole[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"grad_weight must be float32 \(40, 16\)"):
        backward(2, grad_weight=torch.ones(40, 16, dtype=torch.float64))


def test_empty() -> None:
    w, p = torch.randn(40, 16), Problem(want=ARGMAX)
    stats, argmax = kernels.linear_row_stats(torch.empty(0, 16), w, None, *arguments(p))
    assert stats.shape == (8, 0) and argmax.shape == (0,)
    args = torch.empty(7, 0), stats, argmax, torch.empty(0, 16), w, w[:, 0], *arguments(p)
    dx, dw, dbias = kernels.linear_row_stats_backward(*args, 7)
    assert dx.shape == (0, 16) and not dw.any() and dw.shape == w.shape and not dbias.any() and dbias.shape == (40,)


def test_pairs_with_the_row_kernels() -> None:
    """Statistics of either op serve the other's backward: the table is one contract."""
    x, w, bias = operands(18, 70, 24)
    p = problem(18, 70, ENTROPY | ARGMAX)
    z = x @ w.T + bias
    of_rows = rows.row_stats(z, *p, block=32)
    of_linear = kernels.linear_row_stats(x, w, bias, *arguments(p), tile=SMALL, splits=2)
    assert torch.equal(of_rows[1], of_linear[1])
    torch.testing.assert_close(of_rows[0], of_linear[0], rtol=1e-5, atol=1e-5)
    coef = torch.randn(7, 18)
    dz = rows.row_stats_backward(coef, *of_linear, z, *p, block=32)
    dx, dw, dbias = kernels.linear_row_stats_backward(
        coef, *of_rows, x, w, bias, *arguments(p), 7, tile=SMALL, width=64
    )
    for ours, expected in ((dx, dz @ w), (dw, dz.T @ x), (dbias, dz.sum(0))):
        check_product(ours, expected.double(), torch.float32, 1.0)


def test_reruns_are_bit_equal() -> None:
    x, w, bias = operands(33, 65, 40)
    p = problem(33, 65, EVERYTHING)
    torch.manual_seed(3)
    first = check(x, w, bias, p)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, check(x, w, bias, p), strict=True))


def test_chunks_of_cross_entropy_in_place() -> None:
    """Mode C as the package runs it: a GEMM into a buffer, cross_entropy over it in place, two GEMMs, chunk by chunk."""
    x, w, bias = operands(20, 70, 16)
    p = problem(20, 70, 0)._replace(scale=1.0)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    e = expect(leaves[0] @ leaves[1].T + bias, p)
    epilogue = torch.stack([torch.rand(20), torch.zeros(20), torch.rand(20) * 0.1, torch.zeros(20)])
    nll = torch.nn.functional.softplus(e.stats[1] + e.stats[0] - e.stats[2])
    _, ignored, _ = p.rows(20, 70)
    (torch.where(ignored, 0.0, epilogue[0] * nll + epilogue[2] * e.lse**2)).sum().backward()
    buffer, dx, dw = torch.empty(8 * 70), torch.empty(20, 16), torch.zeros(70, 16)
    for start in range(0, 20, 8):
        part = slice(start, min(20, start + 8))
        z = buffer[: len(x[part]) * 70].view(-1, 70)
        torch.addmm(bias, x[part], w.T, out=z)
        rows.cross_entropy(z, p.target[part], None, None, epilogue[:, part], -100, 0, 1.0, 0.0, out=z, block=32)
        torch.mm(z, w, out=dx[part])
        dw.addmm_(z.T, x[part])
    check_product(dx, leaves[0].grad, torch.float32, 1.0)
    check_product(dw, leaves[1].grad, torch.float32, 1.0)


FAULTS = {
    "padding columns count as logits of 0": ("tl.where(columns < V, 0.0, NEG_INF)", "tl.where(columns < V, 0.0, 0.0)"),
    "padding columns count in the sums": ("tl.where(inside[None, :], z - base[:, None], 0.0)",
                                          "tl.maximum(z - base[:, None], -9.0)"),
    "depth not masked": ("mask=k[None, :] < D - k0", "mask=k[None, :] < D + 99"),
    "old sums not rescaled": ("expsum = expsum * shrink + tl.sum(e, 1)", "expsum = expsum + tl.sum(e, 1)"),
    "no tile is found to hold a target": ("(column < column0 + BN)", "(column < column0)"),
    "columns of the scratch counted from 0": ("columns = first_column + local", "columns = local"),
    "ignored rows keep a gradient": ("g = tl.where(silent[:, None], 0.0, g)", "g = g"),
    "row blocks placed twice": ("return first + inside % size, inside // size", "return first, inside // size"),
}  # fmt: skip


def patched(folder: Path, old: str, new: str) -> types.ModuleType:
    """linear_row_stats of a copy of the kernels in which one line is wrong."""
    package = folder / f"faulty_linear_{abs(hash((old, new)))}"
    shutil.copytree(Path(kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / "linear_row_stats_kernels.py"
    assert old in file.read_text(), f"{file.name} no longer holds {old!r}"
    file.write_text(file.read_text().replace(old, new))
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package.name}.linear_row_stats")


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(fault: str | None, tmp_path: Path) -> None:
    k = kernels if fault is None else patched(tmp_path, *FAULTS[fault])
    # A view with more columns behind each row: an unmasked depth then reads numbers, not the end of the memory.
    x, w, _ = operands(19, 71, 40)
    p = problem(19, 71, SUM, weighted=False)
    if fault is None:
        check(x[:, :24], w[:, :24], None, p, k, splits=2)
    else:
        with pytest.raises(AssertionError):
            check(x[:, :24], w[:, :24], None, p, k, splits=2)
