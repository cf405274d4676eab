"""`pack_bits` and `unpack_bits` of the cpp backend: every bit as the reference's, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, quant, registry
from fastloss.compiled import _C, MISSING
from fastloss.quant.contract import Pack, row_bytes

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
WIDTHS = (*range(1, 71), 127, 511, 512, 513, 1024, 1100)
HARD = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 0.5, -0.5, 1.5, 2.5, -3.5, 3e4, -3e4)
ALL_KINDS = [(Pack.SIGN, 0, 1), (Pack.TERNARY, 0, 2)] + [
    (Pack.CODES, low, planes) for planes, low in ((1, 0), (2, -2), (3, -4), (4, -8), (4, 0))
]


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


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers with hard ones strewn in."""
    x = 2 * torch.randn(rows, columns)
    at = torch.randint(columns, (rows, 1 + columns // 9))
    return x.scatter(1, at, torch.tensor(HARD)[torch.randint(len(HARD), at.shape)]).to(dtype)


def on(backend: str, op: str, *args: object) -> tuple[Tensor, ...]:
    with registry.use_backend(backend):
        made = registry.run(op, *args)
    return made if isinstance(made, tuple) else (made,)


def check(op: str, *args: object) -> tuple[Tensor, ...]:
    ours, wanted = on("cpp", op, *args), on("reference", op, *args)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_width(isa: int, dtype: torch.dtype) -> None:
    for columns in WIDTHS:
        x = numbers(3, columns, dtype)
        for kind, low, planes in ALL_KINDS if columns % 8 in (0, 1, 7) else ALL_KINDS[:2]:
            scale = torch.tensor([[0.7]]) if kind == Pack.CODES else torch.tensor([[0.5]])
            bits, popcounts = check("pack_bits", x, int(kind), None, scale, 0, low, planes)
            assert bits.shape == (planes, 3, row_bytes(columns))
            unpacked = numpy.unpackbits(bits.numpy(), axis=-1, bitorder="little")
            assert not unpacked[..., columns:].any() and (unpacked.sum(-1) == popcounts.numpy()).all()


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: f"{k[0].name}-{k[1]}-{k[2]}")
@pytest.mark.parametrize("group", [0, 64, 128, 576])
def test_centers_and_scales(isa: int, kind: tuple[Pack, int, int], group: int) -> None:
    for rows, columns in ((4, 1100), (2, 512), (5, 130)):
        groups = -(-columns // group) if group else 1
        x = numbers(rows, columns, torch.float32)
        for center_rows, scale_rows in ((1, rows), (rows, 1), (rows, rows)):
            center, scale = torch.randn(center_rows, groups), torch.rand(scale_rows, groups) + 0.1
            check("pack_bits", x, int(kind[0]), center, scale, group, kind[1], kind[2])


def test_divided_not_multiplied_by_a_reciprocal(isa: int) -> None:
    """x / scale on a half: a reciprocal would round some of them to the other side."""
    scale = torch.rand(64, 1) + 0.5
    x = (torch.arange(-7, 8) + 0.5) * scale
    check("pack_bits", x, int(Pack.CODES), None, scale, 0, -8, 4)


def test_scale_of_zero_and_of_nan(isa: int) -> None:
    x, scale = numbers(3, 70, torch.float32), torch.tensor([[0.0], [float("nan")], [float("inf")]])
    for kind, low, planes in ALL_KINDS:
        check("pack_bits", x, int(kind), None, scale, 0, low, planes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked(isa: int, dtype: torch.dtype) -> None:
    for columns in (*WIDTHS[::5], 511, 513, 1100):
        for weights, offset in (([2], -1), ([-1, 2], 0), ([1, 2, 4], -4), ([2, 4, 8, 16], -15)):
            planes = torch.randint(256, (len(weights), 3, row_bytes(columns)), dtype=torch.uint8)  # padding is not read
            check("unpack_bits", planes, columns, weights, offset, None, 0, dtype)
            for group in (0, 64):
                groups = -(-columns // group) if group else 1
                for rows in (1, 3):
                    scale = torch.randn(rows, groups)
                    check("unpack_bits", planes, columns, weights, offset, scale, group, dtype)


def test_large_results_past_the_cache(isa: int) -> None:
    """Beyond 16 MiB whole lines bypass the cache: rows here begin at any address."""
    planes = torch.randint(256, (1, 3, row_bytes(1_500_001)), dtype=torch.uint8)
    check("unpack_bits", planes, 1_500_001, [2], -1, torch.randn(3, 1), 0, torch.float32)


def test_the_same_on_one_thread_and_on_two(isa: int, threads: None) -> None:
    for shape in ((1, 200_003), (90, 1000)):  # a row that tasks share; rows
        x, found = numbers(*shape, torch.float32), []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(check("pack_bits", x, int(Pack.CODES), None, torch.full((1, 1), 0.3), 0, -8, 4))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[1:, 3:], lambda x: x[:0], lambda x: x[:1].expand(6, -1)],
)
def test_any_strides(isa: int, change) -> None:
    check("pack_bits", change(numbers(8, 150, torch.float32)), int(Pack.SIGN), None, None, 0, 0, 1)


def test_public_functions_run_it(isa: int) -> None:
    """Packed by the functions that users call, in every dtype, back to the same integers."""
    for dtype in DTYPES:
        x = numbers(6, 300, dtype).nan_to_num(-1.0)  # NaN is -1, 0 and the lowest code
        wide = x.float()
        wanted = {
            quant.pack_bits(x): torch.where(wide >= 0, 1, -1),
            quant.pack_ternary(x, 0.5): (wide > 0.5).int() - (wide < -0.5).int(),
            quant.pack_codes(x, 0.4, 4): (wide / 0.4).round().clamp(-8, 7),
        }
        for bits, integers in wanted.items():
            assert (quant.unpack_bits(bits, torch.float32) == integers * (0.4 if len(bits.weights) == 4 else 1.0)).all()


def test_a_default_dtype_and_device_do_not_matter(isa: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        check("pack_bits", numbers(2, 40, torch.float32), int(Pack.SIGN), None, None, 0, 0, 1)
        with torch.device("meta"):
            registry.run("pack_bits", torch.zeros(2, 40, device="cpu"), int(Pack.SIGN), None, None, 0, 0, 1)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_not_taken_is_said() -> None:
    x = torch.randn(2, 40)
    for x_given, kind, planes in ((x.double(), Pack.SIGN, 1), (x, Pack.CODES, 5), (x, Pack.TERNARY, 1)):
        assert "cpp        takes" in registry.explain("pack_bits", x_given, int(kind), None, None, 0, 0, planes)
    with pytest.raises(ValueError, match=r"center must be \[2 or 1, 1\], got \[3, 1\]"):
        on("cpp", "pack_bits", x, int(Pack.SIGN), torch.zeros(3, 1), None, 0, 0, 1)
    planes = on("cpp", "pack_bits", x, int(Pack.SIGN), None, None, 0, 0, 1)[0]
    with pytest.raises(ValueError, match="600 columns"):
        on("cpp", "unpack_bits", planes, 600, [2], -1, None, 0, torch.float32)
    with pytest.raises(ValueError, match="isa must be"):
        _C.pack_bits_cpu(
            x=x.data_ptr(), center=0, scale=0, center_rows=0, scale_rows=0, rows=2, columns=40, group=0, dtype=0, kind=0,
            low=0, planes=1, bits=planes.data_ptr(), popcounts=0, isa=9,
        )  # fmt: skip
