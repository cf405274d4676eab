"""The encoders of the cpp backend: every byte as the reference's, on every instruction set and number of threads."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, lossless, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless.contract import NUMBERS, P7_NUMBERS, pair_table
from lossless_cases import CODED, SIZES, bits, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
P7_DTYPES = tuple(d for d in CODED if NUMBERS[d] in P7_NUMBERS)


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


def on(backend: str, op: str, *args: Any) -> list[Tensor]:
    """All tensors that the op returns, in a row."""
    with registry.use_backend(backend):
        made = registry.run(op, *args)
    parts = made if isinstance(made, tuple) else (made,)
    return [t for part in parts for t in (part if isinstance(part, list) else [part])]


def check(op: str, x: Tensor, *args: Any) -> None:
    """The same dtypes, shapes and bytes from both backends, and `x` as it was."""
    before = zlib.crc32(bits(x).numpy())
    ours, wanted = on("cpp", op, x, *args), on("reference", op, x, *args)
    assert len(ours) == len(wanted)
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{op} result {i}"
        assert torch.equal(bits(a), bits(b)), f"{op} result {i} of {x.dtype} {list(x.shape)}"
    assert zlib.crc32(bits(x).numpy()) == before


def check_all(x: Tensor) -> None:
    """Every op of the encoders that takes `x`."""
    check("byte_split", x)
    for plane in on("reference", "byte_split", x)[: 1 if x.dtype.itemsize == 1 else None]:
        if plane.numel() >= x.numel():
            check("byte_histogram", plane, x.numel())
    if x.dtype in P7_DTYPES:
        check("p7_histogram", x)
        counts = on("reference", "p7_histogram", x)[0].numpy()
        check("p7_encode", x, torch.from_numpy(pair_table(counts)))


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_every_size(dtype: torch.dtype, isa: int) -> None:
    for count in SIZES:
        check_all(mostly_normal(count, dtype, count) if count < 40000 else normal(count, dtype))


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_every_kind_of_number(dtype: torch.dtype, isa: int) -> None:
    if dtype.itemsize < 4:
        check_all(every_pattern(dtype))
    for x in (uniform_bits(20001, dtype), constant(16385, dtype), torch.zeros(300, dtype=dtype), constant(1, dtype)):
        check_all(x)
    check_all(bits(normal(30000, dtype))[dtype.itemsize :].view(dtype))  # memory that is not aligned to a vector


@pytest.mark.parametrize("dtype", P7_DTYPES, ids=str)
def test_any_table(dtype: torch.dtype, isa: int) -> None:
    """Entries that are equal, that never occur, of few fields and of many."""
    x = mostly_normal(5000, dtype)
    everything = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for table in (everything, everything // 16, everything % 31, everything % 32 + 100, torch.zeros_like(everything)):
        check("p7_encode", x, table)
    check("p7_encode", uniform_bits(5000, dtype), everything[torch.randperm(256)])


def test_ranks_and_plain_look_up_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 pairs of fields, by the table of 65,536 and by ranks in registers."""
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    x = (torch.stack((first, second), 2).reshape(-1) << 7).to(torch.int16).view(torch.bfloat16)
    table = torch.randint(110, 141, (256,), dtype=torch.uint8)
    made = []
    for level in range(_C.best_isa() + 1):
        monkeypatch.setattr(backend_cpp, "ISA", level)
        made.append(on("cpp", "p7_encode", x, table))
    for other in made[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    x = mostly_normal(7 * 16384 + 1001, dtype)
    table = (torch.arange(256, dtype=torch.int32) % 16 + 110).to(torch.uint8)
    calls: list[tuple[Any, ...]] = [("byte_split", x), ("byte_histogram", bits(x), x.numel())]
    if dtype in P7_DTYPES:
        calls += [("p7_histogram", x), ("p7_encode", x, table)]
    made = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        made.append([bits(t) for call in calls for t in on("cpp", *call)])
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes these kernels away, so that `compress` runs the reference's; checksums, far slower there, stay."""

    def take() -> None:
        for op in ("p7_histogram", "p7_encode", "byte_split", "byte_histogram"):
            monkeypatch.delitem(registry._kernels[op], "cpp")

    return take


@pytest.mark.parametrize("codec", ["p7", "r8"])
@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_the_same_blob(dtype: torch.dtype, codec: str, without: Callable[[], None]) -> None:
    if codec == "p7" and dtype not in P7_DTYPES:
        codec = "raw"
    every_seventh = torch.arange(3000) % 7 == 0
    all_x = [
        normal(20000, dtype), mostly_normal(5001, dtype), uniform_bits(300, dtype), constant(4000, dtype),
        normal(3000, torch.bfloat16).to(dtype), normal(3000, torch.float32).where(every_seventh, 0).to(dtype),
        normal(1, dtype), normal(0, dtype),
    ]  # fmt: skip
    ours = [lossless.compress(x, codec).blob for x in all_x]
    without()
    for x, blob in zip(all_x, ours, strict=True):
        assert torch.equal(blob, lossless.compress(x, codec).blob), (dtype, x.shape)


@pytest.mark.parametrize("dtype", P7_DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype, without: Callable[[], None]) -> None:
    x = normal(96 * 128, dtype).reshape(96, 128)
    views = [x.t(), x[::2], x[:, 3:100], x[:40].expand(2, 40, 128), x]
    layouts = ["rows"] * 4 + ["tiles"]
    before = [bits(v) for v in views]
    ours = [lossless.compress(v, "p7", layout=layout).blob for v, layout in zip(views, layouts, strict=True)]
    assert all(torch.equal(bits(v), b) for v, b in zip(views, before, strict=True))
    without()
    for v, layout, blob in zip(views, layouts, ours, strict=True):
        assert torch.equal(blob, lossless.compress(v.clone(), "p7", layout=layout).blob)
