"""Encoding straight into a blob on a CPU: the same bytes as by separate passes, whatever the numbers and the room."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, lossless, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless import cpp_encode, cpp_r8
from fastloss.lossless.contract import BLOCK, NUMBERS, Codec, Section, blocks_of, padded
from fastloss.lossless.reference_r8 import byte_split
from lossless_cases import CODED, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))
LEVELS = range(_C.best_isa() + 1) if _C is not None else ()
compress = importlib.import_module("fastloss.lossless.compress")  # the package's `compress` is the function


@pytest.fixture(autouse=True)
def _set_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend_cpp, "ISA", -1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of more than one is a sample: small tensors go the way of large ones."""
    monkeypatch.setattr(compress, "_SAMPLED", BLOCK)
    monkeypatch.setattr(compress, "_APART", 1)


def by_passes(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """R8 by the reference's passes, all but its stream, which has tests of its own."""
    with monkeypatch.context() as patch:
        for op in ("byte_split", "byte_histogram"):
            patch.delitem(registry._kernels[op], "cpp")
        return lossless.compress(x, "r8").blob


def switching(count: int, dtype: torch.dtype) -> Tensor:
    """Other exponents in the second half than in the first, by which the frequent ones are chosen."""
    x = normal(count, torch.float32)
    x[count // 2 :] *= 2.0**-9
    return x.to(dtype)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_counts_of_fields(dtype: torch.dtype) -> None:
    cases = [every_pattern(dtype)] if dtype.itemsize < 4 else []
    for count in (1, 1023, 1024, 2 * BLOCK + 1025):
        cases += [make(count, dtype) for make in (normal, uniform_bits, constant)]
    many = 3 * BLOCK + 77
    cases += [mostly_normal(many, dtype), switching(many, dtype)]
    cases += [normal(many, dtype).where(torch.arange(many) % 3 > 0, 0)]  # two far apart: weights and zeros
    for x in cases:
        want = torch.bincount(byte_split(x)[0][0][: x.numel()], minlength=256)
        for backend_cpp.ISA in LEVELS:
            assert torch.equal(cpp_encode.field_counts(x), want), (dtype, x.numel(), backend_cpp.ISA)


@pytest.mark.parametrize("dtype", CODED[:3], ids=str)
def test_counts_of_a_sample(dtype: torch.dtype) -> None:
    x = mostly_normal(7 * BLOCK + 5, dtype)
    picked = x[: 6 * BLOCK].reshape(-1, 3, BLOCK)[:, 0].reshape(-1)
    want = torch.stack([torch.bincount(plane, minlength=256) for plane in byte_split(picked)[0][1:]])
    for backend_cpp.ISA in LEVELS:
        assert torch.equal(cpp_encode.sample_plane_counts(x, 2, 3), want)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_the_same_blob(dtype: torch.dtype, sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    within: list[int] = []
    original = compress._r8_within
    monkeypatch.setattr(compress, "_r8_within", lambda x, n: (within.append(x.numel()), original(x, n))[1])
    for x in (normal(40001, dtype), mostly_normal(20000, dtype), switching(17000, dtype)):
        want = by_passes(x, monkeypatch)
        for backend_cpp.ISA in LEVELS:
            within.clear()
            got = lossless.compress(x, "r8", verify=True).blob
            assert torch.equal(got, want) and within
            assert got.untyped_storage().nbytes() == got.numel()
        backend_cpp.ISA = -1


@pytest.mark.parametrize("dtype", CODED[:3], ids=str)
def test_raw_where_the_reference_is_raw(dtype: torch.dtype) -> None:
    """Of sizes at which coding is just worth it: checksums of blocks, which raw numbers have too, do not count."""
    found = set()
    for count in range(100, 2600, 40):
        x = (torch.rand(count, generator=torch.Generator().manual_seed(count)) + 1).to(dtype)
        got = lossless.compress(x, "p7")
        with registry.use_backend("reference"):
            assert torch.equal(got.blob, lossless.compress(x, "p7").blob), count
        found.add(got.codec)
    assert len(found) == 2


def test_raw_where_separate_passes_are_raw(sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, ones = uniform_bits(20000, torch.bfloat16), torch.ones(20000).bfloat16()

    def mixed(noisy: int) -> Tensor:
        return torch.cat((noise[:noisy], ones[noisy:]))

    coded, raw = 0, noise.numel()  # noisy numbers up to which R8 is smaller, and from which it is not
    while raw - coded > 1:
        middle = (coded + raw) // 2
        header = lossless.CompressedTensor(by_passes(mixed(middle), monkeypatch)).header
        coded, raw = (middle, raw) if header.codec == Codec.R8 else (coded, middle)
    for noisy in (coded, raw):
        assert torch.equal(lossless.compress(mixed(noisy), "r8").blob, by_passes(mixed(noisy), monkeypatch))


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_written_past_the_room(threads: int) -> None:
    """Room that ends anywhere: in the first thread's part, in the second's, or where whole vectors would go beyond it."""
    torch.set_num_threads(threads)
    x = switching(20 * BLOCK + 9, torch.bfloat16)
    frequencies = cpp_r8.frequencies(cpp_encode.field_counts(x[: x.numel() // 2]))  # of numbers that change later on
    block_crc = torch.empty(blocks_of(x.numel()), dtype=torch.int32)
    most = 2 * padded(x.numel()) + 1024 * blocks_of(x.numel())

    def encode(size: int) -> tuple[int | None, Tensor]:
        around = torch.full((most + 4096,), 0xA5, dtype=torch.uint8)
        room = {kind: torch.zeros(count, dtype=torch.uint8) for kind, count in cpp_encode.r8_sizes(x, 0).items()}
        made = cpp_encode.r8_encode_within(x, frequencies, room | {Section.FIELD_DATA: around[:size]}, block_crc)
        assert (around[size:] == 0xA5).all(), "written past the room"
        return (made[0] if made else None), around

    for backend_cpp.ISA in LEVELS:
        written, want = encode(most)
        assert written is not None
        for size in (1, 127, 5000, written // 3, written - 20000, written - 65, written - 1, written):
            again, data = encode(size)
            assert again == (written if again is not None else None)
            assert again is None or (size >= written and torch.equal(data[:written], want[:written]))
        assert encode(written + 64)[0] == written


@pytest.mark.parametrize("codec", ["r8", "p7"])
def test_numbers_that_change_meanwhile(codec: str, sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the count and the encoding: other bytes than were counted are coded all the same, or refused."""
    before, after = normal(20 * BLOCK + 9, torch.bfloat16), uniform_bits(20 * BLOCK + 9, torch.bfloat16)
    name = f"{codec}_encode_within"
    original = getattr(compress, name)
    for first, then in ((before, after), (after, before), (before, before * 2.0**-60)):
        x = first.clone()
        with monkeypatch.context() as patch:
            patch.setattr(compress, name, lambda x, *rest, new=then: (x.copy_(new), original(x, *rest))[1])
            try:
                blob = lossless.compress(x, codec)
            except RuntimeError as error:
                assert codec == "p7" and "changed while" in str(error)
                continue
        if blob.codec != Codec.RAW:
            blob.verify()
        assert torch.equal(blob.decompress().view(torch.int16), then.view(torch.int16))


def test_sizes_in_a_compiled_function() -> None:
    """TorchDynamo reads the Python between kernels: to it no member of an enum is in a range."""
    x = normal(2 * BLOCK + 9, torch.bfloat16)
    compiled = torch.compile(lambda x: (x + 1, cpp_encode.r8_sizes(x, 5)), backend="eager")
    assert compiled(x)[1] == cpp_encode.r8_sizes(x, 5)


@pytest.mark.parametrize("least", [1, 5000, 100_000])
def test_too_little_room(least: int, sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(20 * BLOCK + 9, torch.bfloat16)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        want = lossless.compress(x, "r8").blob
        with monkeypatch.context() as patch:
            patch.setattr(compress, "_likely_bytes", lambda counts, freq: least)
            assert torch.equal(lossless.compress(x, "r8", verify=True).blob, want)


def test_likely_bytes_are_enough(sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the numbers, whatever their exponents."""
    calls: list[bool] = []
    original = compress.r8_encode_within
    monkeypatch.setattr(compress, "r8_encode_within", lambda *a: (calls.append(True), original(*a))[1])
    for dtype in CODED:
        for make in (normal, mostly_normal, constant, switching):
            for count in (BLOCK + 1, 5 * BLOCK + 3):
                calls.clear()
                lossless.compress(make(count, dtype), "r8")
                assert len(calls) <= 1, (dtype, make, count)


@pytest.mark.parametrize("codec", ["r8", "p7"])
@pytest.mark.parametrize("dtype", CODED[:3], ids=str)
def test_checksums_of_any_number_of_threads(dtype: torch.dtype, codec: str, sampled: None) -> None:
    x = mostly_normal(33 * BLOCK + 1001, dtype)
    blobs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        blobs.append(lossless.compress(x, codec, verify=True).blob)
    assert all(torch.equal(blobs[0], other) for other in blobs)


@pytest.mark.parametrize("codec", ["r8", "p7"])
def test_past_the_cache(codec: str) -> None:
    """A plane of more than 16 MiB is streamed with AVX-512 alone."""
    x = normal(1 << 21, torch.bfloat16).repeat(8)
    x = torch.cat((x, x[:1001]))
    blobs = []
    for backend_cpp.ISA in (-1, 0):
        blobs.append(lossless.compress(x, codec, verify=True).blob)
    assert torch.equal(*blobs)


def flat(numel: int, first: int, kept: int) -> Tensor:
    """Bytes first .. first + kept, each about as often, and one in 32 any other."""
    generator = torch.Generator().manual_seed(kept)
    common = torch.randint(first, first + kept, (numel,), generator=generator)
    rare = torch.randint(0, 256, (numel,), generator=generator)
    return torch.where(torch.rand(numel, generator=generator) < 31 / 32, common, rare).to(torch.uint8)


def sharp(numel: int, slots: int) -> tuple[Tensor, Tensor]:
    """A byte of `slots` slots, its neighbour and escapes."""
    generator = torch.Generator().manual_seed(slots)
    plane = (torch.rand(numel, generator=generator) < 0.3).to(torch.uint8) + 100
    plane[torch.rand(numel, generator=generator) < 0.01] = 7
    frequencies = torch.zeros(256, dtype=torch.uint8)
    frequencies[100], frequencies[101] = slots, 254 - slots
    return plane, frequencies


@pytest.mark.parametrize("apart", [1, 126, 127, 128, 200])
def test_counts_of_bytes_far_apart(apart: int) -> None:
    """Frequent ones that one look-up finds, or does not, and some of all others."""
    generator = torch.Generator().manual_seed(apart)
    numel = 3 * BLOCK + 5
    plane = (torch.rand(numel, generator=generator) < 0.4).to(torch.uint8) * apart + 10
    rare = torch.randint(0, 256, (numel,), generator=generator).to(torch.uint8)
    plane = torch.where(torch.rand(numel, generator=generator) < 1 / 100, rare, plane)
    for backend_cpp.ISA in LEVELS:
        assert torch.equal(cpp_encode.byte_histogram(plane, numel), torch.bincount(plane, minlength=256))


def every_way() -> Iterator[tuple[Tensor, Tensor]]:
    """Planes and tables for each of the loops: near one another or not, up to 31, up to 63 and more kept bytes."""
    numel = 5 * BLOCK + 33
    for first, kept in ((100, 10), (0, 31), (225, 31), (100, 40), (1, 63), (0, 120)):
        plane = flat(numel, first, kept)
        frequencies = torch.zeros(256, dtype=torch.uint8)
        frequencies[first : first + kept] = 250 // kept
        yield plane, frequencies
        for apart in (62, 63, 64, kept + 100):  # one more, at the end of what one look-up finds, or far from all others
            more = frequencies.clone()
            more[(first + apart) % 256] = 1
            yield plane, more
    for slots in (1, 2, 127, 128, 129, 171, 220, 243, 246, 253):
        yield sharp(numel, slots)


def test_every_way_of_the_stream() -> None:
    """Four full blocks side by side and the last two alone, as by plain code."""
    for plane, frequencies in every_way():
        made = []
        for backend_cpp.ISA in LEVELS:
            made.append(cpp_r8.r8_encode(plane, frequencies, plane.numel()))
        for offsets, data in made[1:]:
            assert torch.equal(offsets, made[0][0]) and torch.equal(data, made[0][1])


@pytest.mark.parametrize("make", [normal, mostly_normal, uniform_bits])
def test_numbers_are_left_alone(make: Callable[[int, torch.dtype], Tensor], sampled: None) -> None:
    for dtype in NUMBERS:
        x = make(30000, dtype)
        before = x.view(torch.uint8).clone()
        lossless.compress(x, "r8")
        assert torch.equal(x.view(torch.uint8), before)
