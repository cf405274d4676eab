"""`binarize` and its backward of the cpp backend against the reference and float64, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from binarize_cases import CASES, KIND_NAMES, KINDS, LAYOUTS, NAMES, Case, numbers, parameters
from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.quant import reference_quant
from fastloss.quant.contract import Grad, Save, Surrogate, row_bytes
from tolerance import check_close

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
EVERYTHING = int(Grad.X | Grad.SCALE | Grad.SHIFT)


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


def on(backend: str, op: str, *args: object) -> tuple[Tensor, ...]:
    with registry.use_backend(backend):
        return registry.run(op, *args)


def all_saves(case: Case) -> int:
    return int(Save.DENSE | Save.SIGNS | Save.MASK | (Save.CODES if case.ends else Save.NOTHING))


def same(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_width(isa: int, dtype: torch.dtype) -> None:
    clip = KINDS[Surrogate.CLIP]
    for columns in (*range(1, 71), 511, 512, 513, 1100):
        x, given = numbers(3, columns, dtype), parameters("rows" if columns % 2 else "one", 3, columns)
        args = (x, *given, *clip.numbers, all_saves(clip))
        ours = on("cpp", "binarize", *args)
        same(ours, on("reference", "binarize", *args))
        assert ours[1].shape == ours[3].shape == (3, row_bytes(columns))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_forward_is_the_reference(isa: int, case: Case) -> None:
    """Every bit, code and number equal, whatever is saved; masks of clip (others' slopes are 0 after rounding or not)."""
    saves = all_saves(case) if case.kind in (Surrogate.CLIP, Surrogate.APPROX, Surrogate.RESTE) else None
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for rows, columns in ((4, 70), (2, 513), (1, 1100)):
                x, given = numbers(rows, columns, dtype), parameters(layout, rows, columns)
                save = saves or all_saves(case) & ~Save.MASK
                args = (x, *given, *case.numbers)
                wanted = on("reference", "binarize", *args, int(save))
                same(on("cpp", "binarize", *args, int(save)), wanted)
                for i, what in ((0, Save.DENSE), (1, Save.SIGNS), (4, save & Save.CODES)):  # alone: elements as one row
                    one = on("cpp", "binarize", *args, int(what))
                    assert torch.equal(one[i].nan_to_num(9.0), wanted[i].nan_to_num(9.0) if what else one[i])


@pytest.mark.parametrize("case", [c for c in CASES if c.ends], ids=[c.name for c in CASES if c.ends])
def test_codes_at_halves(isa: int, case: Case) -> None:
    """254 |u| / t is multiplied, then divided: a factor 254 / t would round some of these to the other side."""
    limit = reference_quant.limit(*case.numbers)
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) * limit / 254
    x = halves.float()[None] * torch.tensor([[1.0], [1 - 2**-23], [1 + 2**-23], [-1.0]])
    args = (x, None, None, 1, 1, *case.numbers, int(Save.CODES))
    same(on("cpp", "binarize", *args), on("reference", "binarize", *args))


def saved(case: Case, forward: tuple[Tensor, ...], x: Tensor) -> list[tuple[Tensor | None, ...]]:
    """(x, signs, mask, codes) of each way of saving."""
    _, signs, _, mask, codes = forward
    ways: list[tuple[Tensor | None, ...]] = [(x, None, None, None), (x, signs, None, None)]
    if case.kind == Surrogate.CLIP:
        ways += [(None, signs, mask, None), (x, None, mask, None)]
    return ways + ([(None, signs, None, codes)] if case.ends else [])


def check_gradients(case: Case, grad: Tensor, kept: tuple[Tensor | None, ...], signs: Tensor, given: tuple) -> None:
    """All three against float64, at u = x - shift as float32 has it."""
    args = (*given, *case.numbers, EVERYTHING)
    ours = on("cpp", "binarize_backward", grad, *kept, *args)
    torch_result = on("reference", "binarize_backward", grad, *kept, *args)
    for a, b in zip(ours, torch_result, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    shift, scale, groups, inner = given
    x = None if kept[0] is None else kept[0].float() - reference_quant.spread(shift, grad, groups, inner, 0.0)
    at = (grad.double(), None if x is None else x.double(), signs, *kept[2:], None, scale, groups, inner, *case.numbers)
    dx, dscale, dshift = on("reference", "binarize_backward", *at, EVERYTHING)
    check_close(ours[0], torch_result[0], dx, grad.dtype)
    # What is summed is rounded before it is: the error is one of the numbers (which check_close measures by the largest
    # of a row), not of their sum, which may cancel. torch's own is the one of its numbers, before and after rounding.
    torch_dx = on("reference", "binarize_backward", grad.float(), x, *kept[1:], None, *at[6:], int(Grad.X))[0]
    for got, wanted, terms, off in ((ours[1], dscale, grad, 0 * dx), (ours[2], dshift, dx, torch_dx - dx)):
        largest = terms.double().abs().amax(1, keepdim=True).expand_as(terms)
        allowed = 4 * torch.finfo(torch.float32).eps * largest + 1.25 * off.abs()
        assert ((got - wanted).abs() <= reference_group_sums(allowed, groups, inner)).all()


def reference_group_sums(terms: Tensor, groups: int, inner: int) -> Tensor:
    """Sums of groups that need not divide anything."""
    group = torch.arange(terms.numel()) // inner % groups
    return torch.zeros(groups, dtype=torch.float64).index_add(0, group, terms.flatten().double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradients_against_float64(isa: int, case: Case, dtype: torch.dtype) -> None:
    for layout, (rows, columns) in (
        ("one", (3, 1099)),
        ("rows", (3, 1099)),
        ("columns", (8, 70)),
        ("channels", (2, 546)),
    ):
        x, grad = numbers(rows, columns, dtype, hard=False), torch.randn(rows, columns).to(dtype)
        given = parameters(layout, rows, columns)
        forward = on("reference", "binarize", x, *given, *case.numbers, all_saves(case))
        for kept in saved(case, forward, x):
            check_gradients(case, grad, kept, forward[1], given)


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_each_gradient_alone_is_the_same(isa: int, case: Case) -> None:
    x, grad = numbers(3, 530, torch.bfloat16), torch.randn(3, 530).bfloat16()
    given = parameters("rows", 3, 530)
    for kept in saved(case, on("reference", "binarize", x, *given, *case.numbers, all_saves(case)), x):
        args = (grad, *kept, *given, *case.numbers)
        whole = on("cpp", "binarize_backward", *args, EVERYTHING)
        for i, needs in enumerate((Grad.X, Grad.SCALE, Grad.SHIFT)):
            alone = on("cpp", "binarize_backward", *args, int(needs))
            assert [a.numel() > 0 for a in alone] == [i == j for j in range(3)]
            assert torch.equal(alone[i].nan_to_num(9.0), whole[i].nan_to_num(9.0))


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_groups_that_divide_nothing(isa: int, case: Case) -> None:
    rows, columns = 7, 523
    x, grad = numbers(rows, columns, torch.float32, hard=False), torch.randn(rows, columns)
    shift, scale, groups, inner = parameters("odd", rows, columns)
    args = (x, None, None, None, shift, scale, groups, inner, *case.numbers)
    ours = on("cpp", "binarize_backward", grad, *args, EVERYTHING)
    dx = reference_quant.binarize_backward(grad.double(), x.double(), *args[1:], int(Grad.X))[0]
    u = x.double() - shift
    sign = torch.where((torch.sin(case.p0 * u) if case.kind == Surrogate.BIPER else u) >= 0, 1.0, -1.0)
    for got, terms in ((ours[1], grad * sign), (ours[2], -dx)):
        allowed = 1e-4 if case.kind == Surrogate.BIPER else 1e-6  # of which float32's angle is
        wanted, size = (reference_group_sums(t, groups, inner) for t in (terms, terms.abs()))
        assert ((got - wanted).abs() <= allowed * size).all()


@pytest.mark.parametrize("case", KINDS, ids=KIND_NAMES)
def test_hard_numbers_have_the_slopes_of_the_table(isa: int, case: Case) -> None:
    """Kinks, NaN, infinities: as the reference has them, bit for bit where a slope is 0, 1 or NaN."""
    x = torch.tensor([[*torch.tensor(CASES[0].kinks + (0.0,)).tolist(), *HARD_POINTS]])
    grad = torch.full_like(x, 0.75)
    args = (x, None, None, None, None, None, 1, 1, *case.numbers, int(Grad.X))
    ours, wanted = (on(b, "binarize_backward", grad, *args)[0] for b in ("cpp", "reference"))
    assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours == 0, wanted == 0)
    assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


HARD_POINTS = (
    *(sign * t for t in (0.1, 0.1000001, 0.3, 0.99999994, 1.0, 1.0000001, 1.5, 1.5000001, 2.0) for sign in (1, -1)),
    float("nan"), float("inf"), -float("inf"), 1e-40, 3e38,
)  # fmt: skip


def test_a_slope_of_zero_stops_any_gradient(isa: int) -> None:
    x, grad = torch.tensor([[3.0, 3.0, 3.0, 0.5]]), torch.tensor([[float("nan"), float("inf"), 1.0, 2.0]])
    for mask in (None, torch.nn.functional.pad(torch.tensor([[8]], dtype=torch.uint8), (0, 63))):
        dx = on(
            "cpp", "binarize_backward", grad, x, None, mask, None, None, None, 1, 1, int(Surrogate.CLIP), 1.0, 0.0, 1
        )[0]
        assert dx.tolist() == [[0, 0, 0, 2]]


@pytest.mark.parametrize("frequency", [20.0, 1000.0])
def test_signs_of_waves_of_large_angles(isa: int, frequency: float) -> None:
    """The sign of the sine of the float32 product, as the C library has it in double, however large it is."""
    magnitude = torch.logspace(-3, 30, 4001)
    x = torch.cat((magnitude, -magnitude, torch.arange(1.0, 500) * math.pi / frequency))[None]
    signs = on("cpp", "binarize", x, None, None, 1, 1, int(Surrogate.BIPER), frequency, 0.0, int(Save.DENSE))[0][0]
    wanted = [1.0 if math.sin(angle) >= 0 else -1.0 for angle in (x[0] * frequency).tolist()]
    assert signs.tolist() == wanted
    grad = on("cpp", "binarize_backward", torch.ones_like(x), x, None, None, None, None, None, 1, 1,
              int(Surrogate.BIPER), frequency, 0.0, 1)[0][0]  # fmt: skip
    slopes = torch.tensor([frequency * math.cos(angle) for angle in (x[0] * frequency).tolist()])
    assert (grad - slopes).abs().max() <= 4 * torch.finfo(torch.float32).eps * frequency


def test_the_same_on_one_thread_and_on_two(isa: int, threads: None) -> None:
    case = KINDS[Surrogate.RESTE]
    for (rows, columns), layout in (((1, 150_002), "one"), ((80, 1001), "columns"), ((80, 1002), "rows")):
        dim = 0 if layout == "columns" else 1
        of_half = numbers(rows, columns, torch.float32, hard=False).chunk(2, dim)[0]
        half = torch.randn_like(of_half) * 10 ** (15 * torch.rand_like(of_half))
        x = torch.cat((of_half, of_half), dim)
        grad = torch.cat((half, -half), dim)  # sums that cancel, down to the digits that the order decides
        given, found = parameters(layout, rows, columns), []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            forward = on("cpp", "binarize", x, *given, *case.numbers, all_saves(case))
            backward = on("cpp", "binarize_backward", grad, x, None, None, None, *given, *case.numbers, EVERYTHING)
            found.append((*forward, *backward))
        for other in found[1:]:
            same(other, found[0])


def test_large_results_past_the_cache(isa: int) -> None:
    """Beyond 16 MiB whole lines bypass the cache: rows here begin at any address."""
    x, clip = torch.randn(3, 1_500_001), KINDS[Surrogate.CLIP]
    args = (x, None, torch.rand(3), 3, x.shape[1], *clip.numbers)
    y, _, _, mask, _ = ours = on("cpp", "binarize", *args, int(Save.DENSE | Save.MASK))
    same(ours, on("reference", "binarize", *args, int(Save.DENSE | Save.MASK)))
    back = (y, None, None, mask, None, *args[1:], int(Grad.X))
    same(on("cpp", "binarize_backward", *back), on("reference", "binarize_backward", *back))


@pytest.mark.parametrize("change", [lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[1:, 3:], lambda x: x[:0]])
def test_any_strides(isa: int, change) -> None:
    case, x = KINDS[Surrogate.APPROX], change(numbers(20, 150, torch.float32, hard=False))
    args = (*parameters("rows", *x.shape), *case.numbers)
    same(on("cpp", "binarize", x, *args, all_saves(case)), on("reference", "binarize", x, *args, all_saves(case)))
    ours, wanted = (on(b, "binarize_backward", x, x, None, None, None, *args, 1)[0] for b in ("cpp", "reference"))
    assert torch.allclose(ours, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_not_taken_is_said() -> None:
    x, tail = torch.randn(2, 40), (1, 1, int(Surrogate.BIPER), 20.0, 0.0)
    assert "slope ends somewhere" in registry.explain("binarize", x, None, None, *tail, int(Save.CODES))
    assert "cpp        takes float32" in registry.explain("binarize", x.double(), None, None, *tail, 1)
    with pytest.raises(ValueError, match=r"scale must have 1 or 1 numbers, got \[3\]"):
        on("cpp", "binarize", x, None, torch.ones(3), *tail, 1)
    with pytest.raises(ValueError, match=r"x of a gradient \[2, 40\] must be \[2, 40\], got \[2, 41\]"):
        on("cpp", "binarize_backward", x, torch.randn(2, 41), None, None, None, None, None, *tail, 1)
    with pytest.raises(ValueError, match="needs x, mask or codes"):
        on("cpp", "binarize_backward", x, None, None, None, None, None, None, *tail, 1)
    with pytest.raises(ValueError, match="x or signs"):
        on("cpp", "binarize_backward", x, None, None, None, None, None, None, 1, 1, 0, 0.0, 0.0, int(Grad.SCALE))
