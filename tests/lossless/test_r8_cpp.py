"""R8 in C++: the reference's bytes from every instruction set, and no step outside of what it was given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, registry
from fastloss.compiled import _C
from fastloss.lossless import contract, cpp_r8
from fastloss.lossless.reference_r8 import byte_split, r8_encode
from guarded_bytes import Guarded
from lossless_cases import SIZES, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
LEVELS = range(_C.best_isa() + 1) if _C is not None else ()
SLACK = 64
Encode = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _isa_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_cpp, "ISA", -1)


def table_of(plane: Tensor, numel: int) -> Tensor:
    return torch.from_numpy(contract.frequencies(torch.bincount(plane[:numel], minlength=256).numpy()))


def decode(frequencies: Tensor, offsets: Tensor, data: int, data_bytes: int, numel: int, isa: int) -> Tensor:
    """The bytes of all blocks, and a check that nothing else of `out` was written."""
    out = torch.full((numel + 128,), 0xA5, dtype=torch.uint8)
    at = 64
    _C.r8_decode_cpu(
        frequencies=frequencies.data_ptr(), offsets=offsets.data_ptr(), data=data, data_bytes=data_bytes, numel=numel,
        out=out.data_ptr() + at, isa=isa,
    )  # fmt: skip
    assert (out[:at] == 0xA5).all() and (out[at + numel :] == 0xA5).all()
    return out[at : at + numel]


def check(plane: Tensor, frequencies: Tensor, numel: int, encode: Encode = r8_encode) -> None:
    """Encoded as by the reference, decoded to the same bytes, with every instruction set."""
    backend_cpp.ISA = 0
    want_offsets, want = encode(plane, frequencies, numel)
    for backend_cpp.ISA in LEVELS:
        offsets, data = cpp_r8.r8_encode(plane, frequencies, numel)
        assert torch.equal(offsets, want_offsets) and torch.equal(data, want)
        padded = torch.cat((data, torch.full((SLACK,), 0x5A, dtype=torch.uint8)))
        got = decode(frequencies, offsets, padded.data_ptr(), data.numel(), numel, backend_cpp.ISA)
        assert torch.equal(got, plane[:numel])


@pytest.mark.parametrize("make", [normal, mostly_normal, uniform_bits, constant])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_sizes(make, dtype):
    for numel in SIZES[:-2] if make is normal and dtype == torch.bfloat16 else (1, 33, 16385):
        for plane in byte_split(make(numel, dtype))[0][: 2 if numel < 300 else 1]:
            check(plane, table_of(plane, numel), numel)


def test_three_and_five_blocks():
    for numel in (3 * contract.BLOCK, 4 * contract.BLOCK + 77):
        plane = byte_split(mostly_normal(numel, torch.bfloat16))[0][0]
        check(plane, table_of(plane, numel), numel)


def test_all_patterns():
    x = every_pattern(torch.float16)[: 2 * contract.BLOCK]
    for plane in byte_split(x)[0]:
        check(plane, table_of(plane, x.numel()), x.numel())


def skewed(kept: int, numel: int, seed: int = 0) -> Tensor:
    """Bytes of which `kept` are common, each a little less than the one before, and all others rare."""
    generator = torch.Generator().manual_seed(seed)
    common = (torch.rand(numel, generator=generator) ** 1.5 * kept).to(torch.int64) * 37 % 256
    rare = torch.randint(0, 256, (numel,), generator=generator)
    return torch.where(torch.rand(numel, generator=generator) < 0.97, common, rare).to(torch.uint8)


@pytest.mark.parametrize("kept", [1, 15, 31, 32, 33, 62, 63, 64, 65, 200, 255])
def test_number_of_symbols(kept):
    """Around what one, two and four registers look up."""
    plane = skewed(kept, 3000)
    frequencies = torch.zeros(256, dtype=torch.uint8)
    frequencies[torch.arange(kept) * 37 % 256] = 1
    frequencies[0] += (255 - kept) // 2
    check(plane, frequencies, 3000)


def test_every_frequency():
    """x / f is exact for every f, alone with the escape and beside a symbol of one slot."""
    plane = skewed(2, 9000)
    for f in range(1, 256):
        frequencies = torch.zeros(256, dtype=torch.uint8)
        frequencies[0] = f
        if f < 254:
            frequencies[37] = 1
        check(plane, frequencies, 9000, cpp_r8.r8_encode)
        if f % 64 == 63:
            check(plane, frequencies, 700)


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("seed", range(6))
def test_hostile_bytes(seed, at_end):
    """Random tables, offsets and streams: nothing outside is read, and all instruction sets see the same."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_(count: int, below: int = 256) -> Tensor:
        return torch.randint(0, below, (count,), generator=generator).to(torch.uint8)

    tables = (bytes_(256), bytes_(256, 2), bytes_(256) * 0, skewed(3, 256, seed), bytes_(256, 9) // 8)
    for size in (1, 63, 64, 65, 127, 3000):
        numel = contract.BLOCK * 4 + 1000
        offsets = torch.randint(-2, size + 3, (6,), generator=generator)
        offsets[seed % 6] = [-1, 1 << 62, -(1 << 63), 0, size, size - 1][seed % 6]
        data = Guarded(torch.cat((bytes_(size), bytes_(SLACK))), at_end)
        table = tables[seed % 5]
        first, *others = (decode(table, offsets, data.address, size, numel, isa) for isa in LEVELS)
        assert all(torch.equal(first, other) for other in others)


def test_why_not():
    plane, frequencies = torch.zeros(200, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    frequencies[0] = 1
    assert cpp_r8.why_not_encode(plane, frequencies, 200) is None
    assert "sum 0" in str(cpp_r8.why_not_encode(plane, frequencies * 0, 200))
    assert "sum 256" in str(cpp_r8.why_not_encode(plane, frequencies * 0 + 1, 200))
    assert "int64" in str(cpp_r8.why_not_encode(plane.long(), frequencies, 200))
    assert "got 201" in str(cpp_r8.why_not_encode(plane, frequencies, 201))
    assert registry.choose("r8_encode", plane, frequencies, 200) == "cpp"
    offsets, zeros = torch.empty(2, dtype=torch.int64), torch.zeros(256, dtype=torch.uint8)
    with pytest.raises(ValueError, match="share 1 to 255"):
        _C.r8_encode_cpu(
            plane=zeros.data_ptr(), frequencies=zeros.data_ptr(), numel=1, offsets=offsets.data_ptr(), isa=-1
        )


def test_threads_make_the_same_bytes():
    numel = 40 * contract.BLOCK
    plane = byte_split(normal(numel, torch.bfloat16))[0][0]
    frequencies, before = table_of(plane, numel), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpp_r8.r8_encode(plane, frequencies, numel)
        torch.set_num_threads(3)
        together = cpp_r8.r8_encode(plane, frequencies, numel)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_the_callers_tensors_are_left_alone():
    plane = byte_split(normal(5000, torch.bfloat16))[0][0]
    frequencies = table_of(plane, 5000)
    kept = plane.clone(), frequencies.clone()
    cpp_r8.r8_encode(plane, frequencies, 5000)
    assert torch.equal(plane, kept[0]) and torch.equal(frequencies, kept[1])
