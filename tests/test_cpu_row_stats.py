"""The CPU row kernel by itself: every instruction set of this machine, mode, dtype and statistic against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, reference
from fastloss.compiled import _C, MISSING
from fastloss.contract import NUM_COEFS, NUM_EPILOGUES, NUM_STATS, Coef, Stat, Want
from hard_rows import INF, ROWS, hard_rows

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

# Not the registered ops: those raise for bad class ids before the kernel sees them.
KERNEL = backend_cpp.rows
ALL = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.TEMPERED | Want.ARGMAX)
UNTEMPERED = ALL & ~Want.TEMPERED  # what the fused mode can be asked for
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
ROUNDING = 2.0**-24


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Rows(NamedTuple):
    """What a call is about, in the order of the ops."""

    logits: Tensor
    target: Tensor | None
    prob: Tensor | None = None
    weight: Tensor | None = None
    temperature: Tensor | None = None
    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0

    def double(self) -> Rows:
        return Rows(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))

    def fused(self, epilogue: Tensor) -> tuple[Any, ...]:
        """The arguments of the fused mode."""
        return *self[:4], epilogue, *self[5:]


def rows_of(kind: str, logits: Tensor, **options: Any) -> Rows:
    """ids, probabilities (in the logits' dtype or float32) or neither; with weights and temperatures."""
    n, v = logits.shape
    target = prob = None
    if kind == "ids":
        target = torch.randint(0, v, (n,))
        target[0], target[1], target[-1] = 0, v - 1, -100
    elif kind.startswith("prob"):
        prob = (torch.randn(n, v) * 2).softmax(-1).to(torch.float32 if kind.endswith("32") else logits.dtype)
    return Rows(logits, target, prob, torch.rand(v) + 0.5, torch.rand(n) + 0.5, **options)


def assert_near(got: Tensor, truth: Tensor, allowed: Tensor | float, what: object) -> None:
    """NaN and infinities where the truth has them; elsewhere within `allowed`."""
    got, allowed = got.double(), torch.as_tensor(allowed, dtype=torch.float64).expand_as(truth)
    bad = ~((got == truth) | (got.isnan() & truth.isnan()) | ((got - truth).abs() <= allowed))
    if bad.any():
        i = tuple(int(k) for k in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} wrong, first at {list(i)}: got {got[i]:.9g}, "
            f"float64 {truth[i]:.9g}, allowed error {allowed[i]:.3g}"
        )


def finite(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, 0.0, 0.0, 0.0)


def sizes(rows: Rows, truth: Tensor) -> Tensor:
    """What the rounding of each statistic is a small multiple of: the numbers it sums, and z itself under a softcap."""
    wide, v = rows.double(), rows.logits.shape[1]
    x = finite(reference.scores(wide.logits, rows.scale, rows.softcap) - reference.finite(truth[Stat.MAX])[:, None])
    c = torch.ones(v, dtype=torch.float64) if wide.weight is None else wide.weight
    size = 1 + finite(truth).abs()
    size[Stat.MAX] = finite(truth[Stat.MAX]).abs()
    size[Stat.LOGSUM] += 1  # a float32 log of what may be near 1
    size[Stat.SUM], size[Stat.SUMSQ] = (c * x.abs()).sum(-1), x.square().sum(-1)
    if wide.prob is not None:
        size[Stat.TARGET] = (wide.prob * c * x.abs()).sum(-1)
    of_z = torch.ones_like(size)
    of_z[Stat.SUM], of_z[Stat.MASS] = c.sum(), 0
    of_z[Stat.SUMSQ] = (2 * x.abs() + 4 * ROUNDING * rows.softcap).sum(-1)
    if wide.temperature is not None:
        of_z[Stat.LOGSUM_T] = 1 / wide.temperature
    return size + rows.softcap * of_z


def check_statistics(stats: Tensor, argmax: Tensor, rows: Rows, what: object) -> Tensor:
    """Returns the statistics in float64."""
    truth, top = reference.row_stats(*rows.double())
    allowed = 8 * ROUNDING * sizes(rows, truth)
    for stat in Stat:
        assert_near(stats[stat], truth[stat], allowed[stat], (stat.name, what))
    if rows.softcap == 0:  # tanh in float32 makes ties
        assert torch.equal(argmax, top), what
    return truth


def check_gradient(dlogits: Tensor, truth: Tensor, rows: Rows, what: object) -> None:
    """Rounded once to the dtype of the logits, from float32 arithmetic over the row's largest numbers."""
    dtype, capped = rows.logits.dtype, 3 if rows.softcap else 1
    relative = 0.505 * torch.finfo(dtype).eps + 2e-6 * capped
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    row = finite(truth).abs().amax(-1, keepdim=True)
    assert_near(dlogits, truth, relative * finite(truth).abs() + 2e-6 * capped * row + smallest, ("gradient", what))


def epilogue_of(n: int, want: int) -> Tensor:
    epilogue = torch.rand(NUM_EPILOGUES, n) + 0.1
    if not want & Want.SUM:
        epilogue[3] = 0
    return epilogue


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_all_modes(rows: Rows, what: object) -> None:
    """Statistics; a gradient from them; the fused mode: right, and in place the same bits."""
    n = rows.logits.shape[0]
    stats, argmax = KERNEL.row_stats(*rows)
    check_statistics(stats, argmax, rows, what)

    coef = torch.randn(NUM_COEFS, n)
    truth = reference.row_stats_backward(coef.double(), stats.double(), argmax, *rows.double())
    dlogits = KERNEL.row_stats_backward(coef, stats, argmax, *rows)
    check_gradient(dlogits, truth, rows, what)
    copy = rows.logits.clone()
    assert KERNEL.row_stats_backward_in_place(coef, stats, argmax, copy, *rows[1:]) is copy
    assert same_bits(copy, dlogits), what

    loops_differ = rows.want == Want.TEMPERED  # nothing else is wanted: the fused mode takes the lean loops
    rows = rows._replace(want=rows.want & UNTEMPERED)
    epilogue = epilogue_of(n, rows.want)
    *_, truth = reference.cross_entropy(*rows.double().fused(epilogue.double()))
    fused = KERNEL.cross_entropy(*rows.fused(epilogue))
    check_gradient(fused[2], truth, rows, ("fused", what))
    assert loops_differ or same_bits(fused[0][: Stat.LOGSUM_T], stats[: Stat.LOGSUM_T]), what
    assert torch.equal(fused[1], argmax), what
    copy = rows.logits.clone()
    again = KERNEL.cross_entropy_in_place(*rows._replace(logits=copy).fused(epilogue))
    assert all(same_bits(a, b) for a, b in zip(again, fused, strict=True)), what


@pytest.mark.parametrize("kind", ["ids", "probabilities", "probabilities in float32", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_statistic_and_mode(isa: int, dtype: torch.dtype, kind: str) -> None:
    plain, shrunk, negative, capped = (1.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.75, 3.0)
    flags = [int(flag) for flag in Want if flag]
    cases = [(1, 0, plain), (1, ALL, capped), (37, 0, shrunk), (37, 0, negative), (37, ALL, capped)]
    cases += [(37, want, (-0.75, 3.0)) for want in flags]
    cases += [(4101, 0, plain), (4101, ALL, negative)]  # several blocks, and a part of a vector
    for v, want, (scale, softcap) in cases:
        logits = (torch.randn(5, v) * 3).to(dtype)
        check_all_modes(rows_of(kind, logits, want=want, scale=scale, softcap=softcap), (v, want, scale, softcap))


@pytest.mark.parametrize("kind", ["ids", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_holes_and_offset(isa: int, dtype: torch.dtype, kind: str) -> None:
    """-inf in one column, all, all but one and half of them; an offset that float32 sums of logits would not survive."""
    offset = {torch.float32: 1e4, torch.float16: 1e3, torch.bfloat16: 1e4}[dtype]
    for v in (37, 4101):
        logits = torch.randn(6, v) * 3
        logits[0, 1] = logits[1] = logits[2, 1:] = logits[3, : v // 2] = -INF
        check_all_modes(rows_of(kind, logits.to(dtype)), (v, "lean"))
        check_all_modes(rows_of(kind, logits.to(dtype), want=int(Want.ENTROPY | Want.ARGMAX)), (v, "general"))
        check_all_modes(rows_of(kind, (torch.randn(5, v) + offset).to(dtype)), (v, "offset"))
        check_all_modes(rows_of(kind, (torch.randn(5, v) + offset).to(dtype), want=ALL), (v, "offset, all"))


@pytest.mark.parametrize("name", ROWS)
def test_hard_rows(isa: int, name: str) -> None:
    """test_ops.py has these rows for the best instruction set and nothing wanted; here every other, and everything."""
    for dtype in DTYPES:
        logits, target = hard_rows(name, dtype)
        want = int(Want.ENTROPY | Want.ARGMAX) if logits.isinf().any() else UNTEMPERED  # a sum over -inf says nothing
        for rows in (Rows(logits, target), Rows(logits, target, want=want)):
            check_all_modes(rows, (dtype, rows.want))


@pytest.mark.parametrize("want", [0, UNTEMPERED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(isa: int, dtype: torch.dtype, want: int) -> None:
    """As in torch: NaN, +inf, and a target of +inf or NaN make the row NaN; the lowest finite number is a number."""
    for v in (5, 5000):
        logits, lowest = torch.randn(7, v), torch.finfo(dtype).min
        target = torch.tensor([0, 0, 2, 3, 1, 1, 4])
        logits[0, v // 2], logits[1, 3], logits[2, 2], logits[3, 3] = torch.nan, INF, INF, torch.nan
        logits = logits.to(dtype)
        logits[4], logits[5] = lowest, lowest
        logits[5, 1] = 3
        epilogue = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None].repeat(1, 7)
        stats, argmax, dlogits = KERNEL.cross_entropy(*Rows(logits, target, want=want).fused(epilogue))
        assert dlogits[:4].isnan().all() and stats[Stat.LOGSUM, :2].isnan().all() and stats[Stat.MAX, 0].isnan()
        assert stats[Stat.TARGET, 3].isnan() and stats[Stat.LOGSUM, 2:4].isfinite().all()
        loss = torch.nn.functional.softplus((stats[Stat.MAX] - stats[Stat.TARGET]) + stats[Stat.LOGSUM])
        torch.testing.assert_close(loss[4], torch.tensor(float(v)).log(), rtol=1e-6, atol=0)
        assert loss[5] == 0 and not dlogits[5].any()
        assert dlogits[6].isfinite().all() and stats[:3, 6].isfinite().all()
        if want:
            assert argmax[:6].tolist() == [v // 2, 3, 2, 3, 0, 1]


@pytest.mark.parametrize("want", [0, ALL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_targets_are_never_an_index(isa: int, dtype: torch.dtype, want: int) -> None:
    """The row's target statistic and gradient are NaN, its other statistics and all other rows are right."""
    logits = torch.randn(7, 130).to(dtype)
    target = torch.tensor([3, 130, -1, 2**40, -(2**63), -100, 129])
    check_all_modes(rows_of("none", logits, want=want)._replace(target=target), want)
    _, _, dlogits = KERNEL.cross_entropy(*Rows(logits, target).fused(epilogue_of(7, 0)))
    assert dlogits.isnan().all(1).tolist() == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("ignored", [-100, 3, 2**40])
@pytest.mark.parametrize("want", [0, ALL])
def test_ignore_index_may_be_a_class_id(isa: int, want: int, ignored: int) -> None:
    """Zeros, argmax -1, and the logits are not read; -100 means nothing where something else is ignored."""
    logits = torch.randn(5, 130)
    target = torch.tensor([7, ignored, 5, ignored, 3 if ignored != 3 else -100])
    check_all_modes(rows_of("none", logits, want=want)._replace(target=target, ignore_index=ignored), ignored)
    logits[1] = torch.nan
    rows = Rows(logits, target, ignore_index=ignored, want=want & UNTEMPERED)
    stats, argmax, dlogits = KERNEL.cross_entropy(*rows.fused(epilogue_of(5, want)))
    assert not stats[:, [1, 3]].any() and not dlogits[[1, 3]].any() and stats[: Stat.LOGSUM, [0, 2]].isfinite().all()
    if want:
        assert argmax[[1, 3]].tolist() == [-1, -1] and (argmax[[0, 2]] >= 0).all()


@pytest.mark.parametrize("rise", [30.0, 87.5, 500.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_rises_late(isa: int, dtype: torch.dtype, rise: float) -> None:
    """Sums relative to the maximum so far are made again before they leave float32. The widest block has 4096 columns;
    e^87.5 is a float32, a thousand of them are not."""
    logits = torch.randn(3, 9000) * 0.1
    logits[0, 5000:] += rise  # a plateau
    logits[1] += torch.arange(9000) // 4096 * rise  # a staircase
    logits[2, -1] += rise
    target = torch.tensor([6000, 5, 8998])
    check_all_modes(Rows(logits.to(dtype), target), rise)


def test_confident_target(isa: int) -> None:
    """The margin form: at d = 20 the gradient of the target is -sigmoid(-20), where 1 - p_y rounds to 0."""
    logits = torch.tensor([[20.0 + torch.tensor(2.0).log().item(), 0.0, 0.0]])
    epilogue = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    for want in (0, ALL & UNTEMPERED):
        _, _, dlogits = KERNEL.cross_entropy(*Rows(logits, torch.tensor([0]), want=want).fused(epilogue))
        expected = 2.0611536e-9 * torch.tensor([[-1.0, 0.5, 0.5]])
        torch.testing.assert_close(dlogits, expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_nothing_beyond_the_row(isa: int, dtype: torch.dtype) -> None:
    """Rows apart and not aligned, in and out: the same bits, and what lies between the rows stays."""
    n, v = 5, 4101
    dense = (torch.randn(n, v) * 3).to(dtype)
    inside, outside = torch.full((n, v + 5), torch.nan, dtype=dtype), torch.full((n, v + 7), 5.0, dtype=dtype)
    view, out = inside[:, 1 : v + 1], outside[:, 3 : v + 3]
    view.copy_(dense)
    for kind in ("ids", "probabilities"):
        for want in (0, UNTEMPERED):
            rows, epilogue = rows_of(kind, dense, want=want), epilogue_of(n, want)
            expected = KERNEL.cross_entropy(*rows.fused(epilogue))
            if rows.prob is not None:  # its rows apart, too
                rows = rows._replace(prob=torch.cat([rows.prob, rows.prob], 1)[:, :v])
            stats, argmax, dlogits = KERNEL.cross_entropy(*rows._replace(logits=view).fused(epilogue), out=out)
            assert same_bits(stats, expected[0]) and torch.equal(argmax, expected[1])
            assert same_bits(dlogits, expected[2])
            assert (outside[:, :3] == 5).all() and (outside[:, v + 3 :] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_gradient(isa: int, dtype: torch.dtype) -> None:
    """More than 16 MiB of gradient bypasses the cache, from a cache line that is not the row's first byte on."""
    n, v = 18, 500_001
    logits, target = torch.randn(1, v).to(dtype).expand(n, v), torch.randint(0, v, (n,))
    for want in (0, int(Want.SUM)):
        rows, epilogue = Rows(logits, target, want=want), epilogue_of(n, want)
        streamed = KERNEL.cross_entropy(*rows.fused(epilogue))
        cached = KERNEL.cross_entropy_in_place(*rows._replace(logits=logits.contiguous()).fused(epilogue))
        assert all(same_bits(a, b) for a, b in zip(streamed, cached, strict=True))


@pytest.mark.parametrize("want", [0, UNTEMPERED])
@pytest.mark.parametrize("shape", [(1, 70_003), (2, 40_001), (97, 1009)], ids=str)
def test_thread_count_does_not_change_a_bit(threads: None, shape: tuple[int, int], want: int) -> None:
    """Threads share out rows; where rows are few and long, the columns of one (test_ops.py has the short ones)."""
    for dtype in (torch.float32, torch.float16):
        logits = (torch.randn(shape) * 3).to(dtype)
        rows = rows_of("ids" if shape[0] > 2 else "none", logits, want=want, softcap=20.0 if want else 0.0)
        epilogue, results = epilogue_of(shape[0], want), []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(KERNEL.cross_entropy(*rows.fused(epilogue)))
        check_statistics(*results[0][:2], rows, dtype)
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), dtype


def test_no_rows(isa: int) -> None:
    rows = Rows(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), want=UNTEMPERED)
    stats, argmax, dlogits = KERNEL.cross_entropy(*rows.fused(torch.empty(NUM_EPILOGUES, 0)))
    assert stats.shape == (NUM_STATS, 0) and argmax.shape == (0,) and dlogits.shape == (0, 7)
    assert KERNEL.row_stats_backward(torch.empty(len(Coef), 0), stats, argmax, *rows).shape == (0, 7)


@pytest.mark.parametrize("level", [-2, 99])
def test_an_instruction_set_that_is_not_there_is_refused(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_cpp, "ISA", level)
    with pytest.raises(ValueError, match=f"isa must be .* got {level}"):
        KERNEL.row_stats(*Rows(torch.randn(2, 3), torch.tensor([0, 1])))
