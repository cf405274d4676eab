"""The encoders of the cpp backend: every byte as the reference's, on every instruction set and number of threads."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from lossless_cases import CODED, SIZES, bits, constant, every_pattern, mostly_normal, normal, uniform_bits
from torch import Tensor

from fastloss import backend_cpp, lossless, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless.contract import NUMBERS, P7_NUMBERS, pair_table

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
    for x in (uniform_bits(20001, dtype), constant(16385, dtype), torch.zeros(300, dtype=dtype), -constant(1, dtype)):
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
    x = mostly_normal(49 * 1000 + 1, dtype)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        check_all(x)


def test_pair_table_of_any_counts() -> None:
    """The 127 most frequent by falling count, then rising pair, as a full sort gives them."""
    generator = numpy.random.default_rng(0)
    for counts in (
        generator.integers(0, 3, 65536), generator.integers(0, 10**12, 65536), numpy.zeros(65536, numpy.int64),
        numpy.ones(65536, numpy.int64), (generator.random(65536) < 0.001).astype(numpy.int64) * 5,
        numpy.minimum(generator.integers(0, 65536, 65536), 65400),
    ):  # fmt: skip
        best = numpy.lexsort((numpy.arange(65536), -counts))[:127]
        best = best[counts[best] > 0]
        table = pair_table(counts)
        assert (table[: best.size] == best & 255).all() and (table[128 : 128 + best.size] == best >> 8).all()
        assert not table[best.size : 128].any() and not table[128 + best.size :].any()


def blob_of(x: Tensor, codec: str, backend: str, layout: str = "rows") -> Tensor:
    """The blob by one backend."""
    with registry.use_backend("reference"):
        if backend == "reference":
            return lossless.compress(x, codec, layout=layout).blob
    return lossless.compress(x, codec, layout=layout).blob


@pytest.mark.parametrize("codec", ["p7", "r8"])
@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_the_same_blob(dtype: torch.dtype, codec: str) -> None:
    if codec == "p7" and dtype not in P7_DTYPES:
        return
    sparse = normal(9000, dtype) * (torch.arange(9000) % 7 == 0).to(dtype).float().to(dtype) if dtype.itemsize > 1 else None
    really_bf16 = normal(9000, torch.bfloat16).to(dtype)
    for x in (
        normal(20000, dtype), mostly_normal(5001, dtype), uniform_bits(3000, dtype), constant(4000, dtype), really_bf16,
        normal(1, dtype), normal(0, dtype), sparse if sparse is not None else normal(8, dtype),
    ):  # fmt: skip
        assert torch.equal(blob_of(x, codec, "cpp"), blob_of(x, codec, "reference")), (dtype, x.shape)


@pytest.mark.parametrize("dtype", P7_DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    x = normal(96 * 256, dtype).reshape(96, 256)
    for view in (x.t(), x[::2], x[:, 3:200], x.expand(2, 96, 256)):
        before = view.clone()
        assert torch.equal(blob_of(view, "p7", "cpp"), blob_of(view.clone(), "p7", "reference"))
        assert torch.equal(bits(view), bits(before))
    assert torch.equal(blob_of(x, "p7", "cpp", "tiles"), blob_of(x, "p7", "reference", "tiles"))
