"""row_stats, row_stats_backward and cross_entropy of the Triton backend, interpreted, against float64 autograd."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from fastloss.triton_kernels import row_stats as kernels
from torch import Tensor

from triton_reference import (
    ARGMAX,
    ENTROPY,
    SUM,
    SUMSQ,
    TEMPERED,
    Problem,
    check_gradient,
    check_stats,
    combine,
    expect,
)

EVERYTHING = ENTROPY | SUM | SUMSQ | TEMPERED | ARGMAX
INF = torch.inf


def problem(
    kind: str, n: int, v: int, want: int, softcap: float = 0.0, scale: float = 1.0, weighted: bool = True
) -> Problem:
    """Targets with an ignored and a non-existing class among them, or probabilities, or neither."""
    target = None
    if kind == "hard":
        target = torch.randint(0, v, (n,))
        if n > 2:
            target[1], target[2] = -100, (1 << 32) + v // 2  # as int32 it would be a column
    return Problem(
        target,
        torch.rand(n, v) if kind == "soft" else None,
        torch.rand(v) + 0.1 if weighted else None,
        torch.rand(n) + 0.5,
        want=want,
        softcap=softcap,
        scale=scale,
    )


def check(logits: Tensor, p: Problem, k: types.ModuleType = kernels, block: int = 32, splits: int | None = 2) -> None:
    """Statistics, and the gradient of a random loss of them."""
    leaf = logits.double().requires_grad_()
    e = expect(leaf, p)
    stats, argmax = k.row_stats(logits, *p, block=block, splits=splits)
    check_stats(stats, argmax, e, p)
    _, ignored, bad = p.rows(*logits.shape)
    loss, coef = combine(e, p, torch.randn(7, logits.shape[0]) * ~(ignored | bad))
    loss.backward()
    expected = leaf.grad.masked_fill(bad[:, None], torch.nan)
    coef[:, ignored] = torch.randn(7, 1)  # must not matter
    ours = k.row_stats_backward(coef, stats, argmax, logits, *p, block=block)
    assert ours.dtype == logits.dtype
    check_gradient(ours, expected, logits.dtype)


@pytest.mark.parametrize(
    "kind,want,softcap",
    [
        ("hard", 0, 0.0),
        ("hard", EVERYTHING, 0.0),
        ("hard", EVERYTHING, 3.0),
        ("hard", ENTROPY, 0.0),
        ("hard", SUM | TEMPERED, 3.0),
        ("hard", SUMSQ, 0.0),
        ("hard", TEMPERED, 0.0),
        ("hard", ARGMAX, 0.0),
        ("soft", 0, 3.0),
        ("soft", EVERYTHING, 0.0),
        ("neither", EVERYTHING, 3.0),
        ("neither", SUM, 0.0),
    ],
)
def test_statistics_and_gradient(kind: str, want: int, softcap: float) -> None:
    check(torch.randn(5, 75) * 3, problem(kind, 5, 75, want, softcap, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n,v,splits", [(1, 1, 1), (3, 33, 1), (2, 200, 5), (1, 129, None)])
def test_shapes(n: int, v: int, splits: int | None, dtype: torch.dtype) -> None:
    check(
        (torch.randn(n, v) * 3).to(dtype), problem("hard", n, v, SUM | SUMSQ | ARGMAX, weighted=v > 33), splits=splits
    )


def test_default_blocks() -> None:
    check(torch.randn(3, 5000), problem("hard", 3, 5000, 0), block=None, splits=None)
    check(torch.randn(3, 5000), problem("soft", 3, 5000, SUM | ARGMAX), block=None, splits=None)


def test_empty() -> None:
    nothing = Problem(want=ARGMAX)
    stats, argmax = kernels.row_stats(torch.empty(0, 7), *nothing)
    assert stats.shape == (8, 0) and argmax.shape == (0,)
    assert kernels.row_stats_backward(torch.empty(7, 0), stats, argmax, torch.empty(0, 7), *nothing).shape == (0, 7)
    stats, _ = kernels.row_stats(torch.empty(2, 0), *nothing)
    assert stats[:, 0].tolist() == [-INF, -INF, -INF, 0, 0, 0, 0, 0]


def hard_logits() -> tuple[Tensor, Tensor]:
    """The rows of DESIGN §3, and their targets."""
    z = torch.randn(9, 100)
    z[0] -= 200  # under the underflow of e^x
    z[1] += 1e4
    z[2, 7] = 500
    z[3, 10:] = -INF
    z[4] = 0
    z[5, 1:] = -INF  # only the target is finite
    z[6, 40] = -INF  # the target itself
    z[8] = -INF
    return z, torch.tensor([3, 5, 7, 2, 1, 0, 40, -100, -100])


@pytest.mark.parametrize("want", [0, ENTROPY | TEMPERED | ARGMAX])
def test_hard_rows(want: int) -> None:
    z, target = hard_logits()
    check(z, Problem(target, temperature=torch.rand(9) + 0.5, want=want), splits=3)
    z[2, 7], z[2, 99] = 0, 500  # the outlier is not the target
    check(z, Problem(target, temperature=torch.rand(9) + 0.5, want=want), splits=1)
    check(z[:8], Problem(temperature=torch.rand(8) + 0.5, want=want))


def test_sums_of_hard_rows() -> None:
    z, target = hard_logits()
    keep = [0, 1, 2, 4, 7]
    check(z[keep], Problem(target[keep], column_weight=torch.rand(100), want=SUM | SUMSQ))
    stats, _ = kernels.row_stats(z[[3, 5]], *Problem(target[[3, 5]], want=SUM | SUMSQ), block=32, splits=2)
    assert stats[4].tolist() == [-INF, -INF] and stats[5].tolist() == [INF, INF]


def test_nan_and_infinity_stay_in_their_row() -> None:
    z = torch.randn(4, 70)
    z[1, 50], z[2, 3] = torch.nan, INF
    p = Problem(torch.tensor([1, 2, 5, 4]), want=ENTROPY | ARGMAX)
    stats, argmax = kernels.row_stats(z, *p, block=32, splits=2)
    assert stats[:2, 1].isnan().all() and stats[1, 2].isnan() and stats[3, 1:3].isnan().all()
    assert stats[:, [0, 3]].isfinite().all() and ((argmax >= 0) & (argmax < 70)).all()
    gradient = kernels.row_stats_backward(torch.ones(7, 4), stats, argmax, z, *p, block=32)
    assert gradient[1].isnan().any() and gradient[2].isnan().any() and gradient[[0, 3]].isfinite().all()


def test_ignored_rows_are_not_read() -> None:
    z = torch.full((2, 40), torch.nan)
    z[1] = 1.0
    p = Problem(torch.tensor([-100, 0]), want=EVERYTHING, temperature=torch.ones(2))
    stats, argmax = kernels.row_stats(z, *p, block=32)
    assert (stats[:, 0] == 0).all() and argmax.tolist() == [-1, 0]
    gradient = kernels.row_stats_backward(torch.ones(7, 2), stats, argmax, z, *p, block=32)
    assert (gradient[0] == 0).all() and gradient[1].isfinite().all()
    out = kernels.cross_entropy(z, p.target, None, None, torch.ones(4, 2), -100, ENTROPY, 1.0, 0.0, block=32)
    assert (out[0][:, 0] == 0).all() and (out[2][0] == 0).all() and out[2].isfinite().all()


def test_strided_views() -> None:
    wide = torch.randn(6, 151)
    check(wide[:, 1:], problem("hard", 6, 150, 0))  # rows that no vector load is aligned to
    check(torch.randn(1, 40).expand(5, 40), problem("soft", 5, 40, 0))
    p = problem("hard", 6, 150, 0)
    with pytest.raises(ValueError, match="stride 1 in its last dimension"):
        kernels.row_stats(torch.randn(150, 6).T, *p)
    z, (stats, argmax) = wide[:, 1:], kernels.row_stats(wide[:, 1:], *p, block=64)
    coef, table = torch.randn(7, 12), torch.cat([stats, stats], 1)
    expected = kernels.row_stats_backward(coef[:, 3:9].contiguous(), stats, argmax, z, *p, block=64)
    out = torch.empty(6, 160)[:, 7:157]
    ours = kernels.row_stats_backward(coef[:, 3:9], table[:, 6:], argmax, z, *p, block=64, out=out)
    assert ours is out and torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


def loss_of(e, p: Problem, z: Tensor, epilogue: Tensor) -> Tensor:
    """The loss that an epilogue describes, from its definition in docs/design.md."""
    b, lse_weight, lse_squared, sum_weight = epilogue.double()
    weight = torch.ones(z.shape[1], dtype=torch.float64) if p.column_weight is None else p.column_weight.double()
    if p.prob is None:
        own, _, _ = p.rows(*z.shape)
        nll = e.lse - torch.where(own, z, 0.0).sum(1)
    else:
        q = p.prob.double() * weight
        nll = q.sum(1) * e.lse - (q * z).sum(1)
    return (b * nll + lse_weight * e.lse + lse_squared * e.lse**2 + sum_weight * (weight * z).sum(1)).sum()


def check_cross_entropy(
    logits: Tensor, p: Problem, epilogue: Tensor, k: types.ModuleType = kernels, **options
) -> Tensor:
    """Statistics, the gradient of the loss that `epilogue` describes, and the same in place."""
    from triton_reference import scores

    leaf = logits.double().requires_grad_()
    e = expect(leaf, p)
    _, ignored, bad = p.rows(*logits.shape)
    loss_of(e, p, scores(leaf, p), epilogue * ~(ignored | bad)).backward()
    args = p.target, p.prob, p.column_weight, epilogue, p.ignore_index, p.want, p.scale, p.softcap
    stats, argmax, dlogits = k.cross_entropy(logits, *args, **options)
    check_stats(stats, argmax, e, p)
    check_gradient(dlogits, leaf.grad.masked_fill(bad[:, None], torch.nan), logits.dtype, 2.0)
    buffer = logits.clone()
    again = k.cross_entropy(buffer, *args, out=buffer, **options)
    assert again[2] is buffer
    for ours, first in zip(again, (stats, argmax, dlogits), strict=True):
        assert torch.equal(ours.nan_to_num(7.0), first.nan_to_num(7.0)), "in place is not the same"
    return dlogits


@pytest.mark.parametrize(
    "kind,want,softcap,dtype",
    [
        ("hard", 0, 0.0, torch.float32),
        ("hard", SUM, 3.0, torch.float32),
        ("hard", ENTROPY | SUM | SUMSQ | ARGMAX, 0.0, torch.bfloat16),
        ("soft", 0, 0.0, torch.float16),
        ("soft", SUM | SUMSQ | ARGMAX, 3.0, torch.float32),
    ],
)
def test_cross_entropy(kind: str, want: int, softcap: float, dtype: torch.dtype) -> None:
    epilogue = torch.rand(4, 5)
    if not want & SUM:
        epilogue[3] = 0
    check_cross_entropy(
        (torch.randn(5, 75) * 3).to(dtype), problem(kind, 5, 75, want, softcap, 0.7), epilogue, block=32
    )


def test_cross_entropy_when_the_target_is_nearly_certain() -> None:
    """The margin form: at a margin of 20 the target's gradient is -2.0612e-9, where p - 1 in fp32 is 0."""
    z = torch.zeros(4, 50)
    margins = torch.tensor([2.2, 6.9, 9.2, 20.0])
    z[:, 3] = margins + torch.tensor(49.0).log()
    epilogue = torch.tensor([1.0, 0, 0, 0])[:, None].expand(4, 4)
    gradient = check_cross_entropy(z, Problem(torch.full((4,), 3)), epilogue, block=64)
    assert torch.allclose(gradient[:, 3].double(), -torch.sigmoid(-margins.double()), rtol=5e-6, atol=0)


def test_cross_entropy_of_hard_rows() -> None:
    z, target = hard_logits()
    keep = [0, 1, 2, 3, 4, 5, 7]
    epilogue = torch.tensor([1.0, 0.1, 0, 0])[:, None].expand(4, 7)
    check_cross_entropy(z[keep], Problem(target[keep]), epilogue, block=32)
    check_cross_entropy(torch.randn(3, 1), Problem(torch.zeros(3, dtype=torch.int64)), epilogue[:, :3])


def test_any_forward_with_any_backward() -> None:
    """The table is the same whatever filled it, and so is the gradient made from it."""
    z, p = torch.randn(4, 90), problem("hard", 4, 90, ENTROPY | SUM)
    leaf = z.double().requires_grad_()
    e = expect(leaf, p)
    _, ignored, bad = p.rows(4, 90)
    loss, coef = combine(e, p, torch.randn(7, 4) * ~(ignored | bad))
    loss.backward()
    expected = leaf.grad.masked_fill(bad[:, None], torch.nan)
    args = p.target, None, p.column_weight, torch.zeros(4, 4), -100, p.want, 1.0, 0.0
    tables = [kernels.row_stats(z, *p, block=32, splits=s) for s in (1, 3)] + [
        kernels.cross_entropy(z, *args, block=32)[:2]
    ]
    for stats, argmax in tables:
        check_stats(stats, argmax, e, p)
        for block in (32, 128):
            check_gradient(kernels.row_stats_backward(coef, stats, argmax, z, *p, block=block), expected, z.dtype)


def test_reruns_are_bit_equal() -> None:
    z, p = torch.randn(3, 100), problem("hard", 3, 100, EVERYTHING)
    runs = [kernels.row_stats(z, *p, block=32, splits=3) for _ in range(2)]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*runs, strict=True))
    coef = torch.randn(7, 3)
    first, second = (kernels.row_stats_backward(coef, *runs[0], z, *p, block=32) for _ in range(2))
    assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


def test_wrong_buffer_is_refused() -> None:
    z, p = torch.randn(2, 8), problem("hard", 2, 8, 0)
    stats, argmax = kernels.row_stats(z, *p)
    with pytest.raises(ValueError, match=r"out must be \(2, 8\) torch.float32"):
        kernels.row_stats_backward(torch.zeros(7, 2), stats, argmax, z, *p, out=torch.empty(2, 8, dtype=torch.float16))


FAULTS = {
    "no tail mask in the statistics": ("row_stats_kernels.py", "tl.where(inside & (c != column), z, NEG_INF)",
                                       "tl.where(c != column, z, NEG_INF)"),
    "target left in the rest": ("row_stats_kernels.py", "tl.where(inside & (c != column), z, NEG_INF)",
                                "tl.where(inside, z, NEG_INF)"),
    "old sums not rescaled": ("row_stats_kernels.py", "expsum = expsum * shrink + e", "expsum = expsum + e"),
    "last column wins a tie": ("row_stats_kernels.py", "(z > best)", "(z >= best)"),
    "splits merged without their base": ("common.py", "mask=keep, other=0.0) + weight * delta", "mask=keep, other=0.0)"),
    "gradient of the target is its probability": ("row_stats_kernels.py", "g = tl.where(c == column, own, g)", "g = g"),
    "no derivative of the softcap": ("row_stats_kernels.py", "g *= 1.0 - (z * (1.0 / cap)) * (z * (1.0 / cap))", "g *= 1.0"),
    "targets judged as int32": ("common.py", "y = tl.load(target + rows, mask=keep, other=-1)",
                                "y = tl.load(target + rows, mask=keep, other=-1).to(tl.int32)"),
    "margin lost": ("row_stats_kernels.py", "own = h - rest", "own = (b + h) * (1.0 / (1.0 + exp(-d))) - b"),
}  # fmt: skip


def patched(folder: Path, file: str, old: str, new: str) -> types.ModuleType:
    """row_stats of a copy of the kernels in which one line is wrong."""
    package = folder / f"faulty_{len(list(folder.iterdir()))}_{abs(hash((old, new)))}"
    shutil.copytree(Path(kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert old in text, f"{file} no longer holds {old!r}"
    (package / file).write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package.name}.row_stats")


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(fault: str | None, tmp_path: Path) -> None:
    k = kernels if fault is None else patched(tmp_path, *FAULTS[fault])
    z = torch.randn(4, 100) - 3  # four blocks, two a split
    z[0, 8] = z[0, 40] = 9  # a tie in one lane
    p = problem("hard", 4, 100, SUM | ARGMAX, softcap=5.0)
    sure = torch.zeros(1, 50)
    sure[0, 3] = 20
    epilogue = torch.tensor([[1.0], [0], [0], [0]])

    def run() -> None:
        torch.manual_seed(1)
        check(z, p, k)
        check_cross_entropy(sure, Problem(torch.tensor([3])), epilogue, k, block=64)

    if fault is None:
        run()
    else:
        with pytest.raises(AssertionError):
            run()
