"""Tensors, outputs and arguments that nobody expects: the right bits or an error that says why, never a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastloss import lossless, registry
from fastloss.lossless import cpp_encode, header
from fastloss.lossless.contract import BLOCK, Section, pair_table
from fastloss.lossless.errors import CorruptError, FormatError

CODECS = ["p7", "r8", "raw"]


def _bits(x: Tensor) -> Tensor:
    """The bytes of what the tensor reads as."""
    plain = torch.empty(x.shape, dtype=x.dtype)
    return plain.copy_(x).reshape(-1).view(torch.uint8)


STRANGE: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(1.5),
    "negative": lambda: torch._neg_view(torch.randn(4000).bfloat16()),
    "negative float32": lambda: torch._neg_view(torch.randn(4000)),
    "conjugate": lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
    "a conjugate's part": lambda: torch.tensor([1 + 2j]).conj().imag,
    "one number of stride 2": lambda: torch.arange(4.0)[::2][:1],
    "flipped": lambda: torch.randn(50, 60).flip(0, 1),
    "expanded": lambda: torch.randn(1, 60).expand(50, 60),
    "no rows": lambda: torch.empty(0, 5),
    "no columns": lambda: torch.empty(5, 0),
    "64 dimensions": lambda: torch.randn(4000).reshape(4000, *[1] * 63),
    "parameter": lambda: torch.nn.Parameter(torch.randn(50, 60)),
}


@pytest.mark.parametrize("codec", ["auto", "r8", "raw"])
@pytest.mark.parametrize("name", STRANGE)
def test_what_it_reads_as_comes_back(name: str, codec: str) -> None:
    x = STRANGE[name]()
    compressed = lossless.compress(x, codec=codec)
    back = lossless.decompress(lossless.CompressedTensor(compressed.blob))
    compressed.verify()
    assert back.shape == x.shape and back.dtype == x.dtype and not back.requires_grad
    assert torch.equal(_bits(back), _bits(x.detach()))


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.randn(4000)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_fake, TypeError, "memory of their own, got FakeTensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(4)]), TypeError, "nested"),
        (lambda: torch.eye(3).to_sparse(), TypeError, "sparse_coo"),
        (lambda: torch.empty(3, device="meta"), TypeError, "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), TypeError, "quantized"),
        (lambda: torch.ones([1] * 65), ValueError, "64 dimensions"),
        (lambda: torch.ones([1] * 300), ValueError, "64 dimensions"),
        (lambda: torch.empty(0, 2**62), ValueError, "2\\^62"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # nested and quantized tensors are prototypes
def test_what_cannot_be_compressed_says_why(make: Callable[[], Tensor], error: type[Exception], says: str) -> None:
    for codec in ("auto", "r8", "raw"):
        with pytest.raises(error, match=says):
            lossless.compress(make(), codec=codec)


def test_tensors_of_a_transform_are_refused() -> None:
    with pytest.raises(TypeError, match="memory of their own"):
        torch.vmap(lambda x: lossless.decompress(lossless.compress(x)))(torch.randn(2, 4000))


@pytest.mark.parametrize("codec", CODECS)
def test_outputs(codec: str) -> None:
    x = torch.randn(300, 100).bfloat16()
    compressed = lossless.compress(x, codec=codec)
    memory = torch.zeros(600, 100).bfloat16()
    for out in (torch._neg_view(memory[:300]), memory[::2], memory.view(-1)[1:30001].view(300, 100)):
        for verify in lossless.compressed_tensor.VERIFY:
            assert lossless.decompress(compressed, out.zero_(), verify) is out
            assert torch.equal(_bits(out), _bits(x))

    for wrong, error, says in (
        ([1], TypeError, "list"),
        (memory[:300].to_sparse(), TypeError, "sparse_coo"),
        (memory[:1].expand(300, 100), ValueError, "strides \\[0, 1\\]"),
    ):
        with pytest.raises(error, match=says):
            lossless.decompress(compressed, wrong)


@pytest.mark.parametrize("codec", CODECS)
def test_an_output_over_the_blob_is_refused_and_the_blob_left_alone(codec: str) -> None:
    x = torch.randn(30000).bfloat16()
    blob = lossless.compress(x, codec=codec).blob
    memory = torch.zeros(blob.numel() + 60064, dtype=torch.uint8)
    compressed = lossless.CompressedTensor(memory[64 : 64 + blob.numel()].copy_(blob))
    with pytest.raises(ValueError, match="share memory"):
        lossless.decompress(compressed, memory[:60000].view(torch.bfloat16), "off")
    compressed.verify()
    beside = memory[64 + blob.numel() :][:60000].view(torch.bfloat16)
    assert torch.equal(lossless.decompress(compressed, beside), x)


@pytest.mark.parametrize("codec", CODECS)
def test_a_graph_that_saved_the_output_knows_that_it_was_written(codec: str) -> None:
    weight, out = torch.ones(4000).bfloat16().requires_grad_(), torch.ones(4000).bfloat16()
    product = (weight * out).sum()
    lossless.decompress(lossless.compress(torch.randn(4000).bfloat16(), codec=codec), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_without_columns(backend: str) -> None:
    empty = lossless.compress(torch.empty(5, 0))
    with registry.use_backend(backend):
        assert empty.rows(torch.tensor([[4, 0, 1]])).shape == (1, 3, 0)
        with pytest.raises(IndexError, match="row 5"):
            empty.rows(torch.tensor([5]))


def test_rows_and_blocks_by_what_is_no_index() -> None:
    some = lossless.compress(torch.randn(40, 1000).bfloat16())
    with pytest.raises(TypeError, match="integer tensor, got list"):
        some.rows([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float"):
        some.block(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, b"FLZ1", torch.empty(500, dtype=torch.uint8, device="meta")])
def test_what_is_no_blob(wrong: Tensor) -> None:
    with pytest.raises(TypeError, match="a blob is a dense 1-D uint8 tensor, got"):
        lossless.CompressedTensor(wrong)
    on_meta = lossless.compress(torch.randn(4000)).to("meta")
    with pytest.raises(ValueError, match="meta"):
        on_meta.decompress()


def test_a_tensor_that_changes_while_it_is_compressed_writes_nowhere_else() -> None:
    x = torch.randn(4000).bfloat16()
    counts = cpp_encode.p7_histogram(x).numpy()
    table = torch.from_numpy(pair_table(counts))
    within = header.room(1, cpp_encode.p7_sizes(x, counts, table), x.device)
    x.view(torch.int16).random_(-(2**15), 2**15)
    with pytest.raises(RuntimeError, match="changed while"):
        cpp_encode.p7_encode_within(x, table, within.parts)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_hostile_offsets_cost_no_more_than_a_block_has_pairs(backend: str) -> None:
    """Every second block says that all escapes are its own: without a bound this is blocks times escapes."""
    x = torch.randn(2 * BLOCK).bfloat16()
    x[::20] *= torch.exp(8 * torch.randn(x[::20].shape)).bfloat16()
    compressed = lossless.compress(x, codec="p7")
    part = {k: compressed.header.sections[k][:2] for k in (Section.ESCAPE_OFFSETS, Section.ESCAPE_POSITIONS)}
    count = part[Section.ESCAPE_POSITIONS][1] // 2
    assert count > 500
    many = {kind: compressed.blob[at : at + size] for kind, (at, size, _) in compressed.header.sections.items()}
    copies = 64  # of the list: more than two blocks have pairs
    for kind in (Section.ESCAPE_POSITIONS, Section.ESCAPE_VALUES):
        many[kind] = many[kind].repeat(copies)
    last = BLOCK // 2 + 5
    assert copies * count > last
    many[Section.ESCAPE_POSITIONS] = many[Section.ESCAPE_POSITIONS].clone()
    many[Section.ESCAPE_POSITIONS].view(torch.int16)[last] = 7  # what the bound leaves out
    many[Section.ESCAPE_POSITIONS].view(torch.int16)[:last] = 9
    many[Section.ESCAPE_POSITIONS].view(torch.int16)[last + 1 :] = 9
    offsets = torch.tensor([0, copies * count, copies * count])
    many[Section.ESCAPE_OFFSETS] = offsets.view(torch.uint8)
    blob, _ = header.build(compressed.codec, compressed.layout, x.dtype, x.shape, many)
    hostile = lossless.CompressedTensor(blob)
    with registry.use_backend(backend):
        got = hostile.decompress(verify="off")
        with pytest.raises(CorruptError):
            hostile.decompress()
    quiet = lossless.CompressedTensor(header.build(
        compressed.codec, compressed.layout, x.dtype, x.shape,
        {k: p for k, p in many.items() if k not in (Section.ESCAPE_POSITIONS, Section.ESCAPE_VALUES)},
    )[0])  # fmt: skip
    without = quiet.decompress(verify="off")
    assert torch.equal(_bits(got[14:16]), _bits(without[14:16]))
    assert not torch.equal(_bits(got), _bits(without))


def _small(codec: str) -> Tensor:
    numbers = torch.randn(1100, generator=torch.Generator().manual_seed(3)).bfloat16()
    return numbers if codec != "raw" else numbers[:100]


@pytest.mark.parametrize("codec", CODECS)
def test_single_bit_flips_are_found_or_harmless(codec: str) -> None:
    x = _small(codec)
    compressed = lossless.compress(x, codec=codec)
    assert compressed.codec.name.lower() == codec
    found = 0
    for bit in range(0, 8 * compressed.nbytes, 5):
        blob = compressed.blob.clone()
        blob[bit // 8] ^= 1 << bit % 8
        try:
            flipped = lossless.CompressedTensor(blob)
        except (CorruptError, FormatError):
            found += 1
            continue
        with pytest.raises(CorruptError):
            flipped.verify()
        flipped.decompress(verify="off")
        try:
            assert torch.equal(_bits(flipped.decompress()), _bits(x)), bit
        except CorruptError:
            found += 1
    assert found > compressed.nbytes // 2


def test_dfloat11_takes_bytes_of_any_strides() -> None:
    luts = torch.zeros(2, 256, dtype=torch.uint8)
    luts[1, 0] = 1  # every bit is a number of exponent 0
    codes, sign_mantissa = torch.zeros(16, dtype=torch.uint8), torch.arange(128, dtype=torch.uint8)
    positions = torch.tensor([0, 128], dtype=torch.int32).view(torch.uint8)
    gaps = torch.zeros(2, dtype=torch.uint8)
    want = torch.ops.fastloss.dfloat11_decode(luts, codes, sign_mantissa, positions, gaps, 128, 8, 2)
    assert torch.equal(want.view(torch.int16), torch.arange(128, dtype=torch.int16))
    for backend in ("cpp", "reference"):
        with registry.use_backend(backend):
            got = torch.ops.fastloss.dfloat11_decode(
                luts, codes.view(4, 4), sign_mantissa.view(2, 64), torch.stack([positions, positions], 1)[:, 0],
                torch.stack([gaps, gaps], 1)[:, 0], 128, 8, 2,
            )  # fmt: skip
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
