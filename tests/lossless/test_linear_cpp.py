"""`lossless_linear` of the cpp backend: as accurate as torch's own product, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, lossless, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless.cpp_linear import MOST_ROWS
from lossless_cases import bits, mostly_normal, normal
from tolerance import check_close

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

LEVELS = ("scalar", "avx2", "avx512", "avx512bf16", "best")
BF16 = torch.bfloat16


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced; "best" may be one more, tiles."""
    level, best = request.param, _C.best_isa()
    if level == len(LEVELS) - 1:
        level = -1
    elif level > best:
        pytest.skip(f"needs {LEVELS[level]}; the best of this machine is {_C.isa_name(best)}")
    monkeypatch.setattr(backend_cpp, "ISA", level)
    return level


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(x: Tensor, packed: lossless.CompressedTensor, bias: Tensor | None) -> Tensor:
    """By our kernel, which must take it."""
    with registry.use_backend("cpp"):
        return torch.ops.fastloss.lossless_linear(x, packed.blob, packed.plan, bias)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The tolerance rule against fp64, and the same bits twice; the caller's tensors as they were."""
    packed = lossless.compress(weight, "p7")
    assert packed.codec.name == "P7"
    before = [bits(t).clone() for t in (x, packed.blob)]
    ours = product(x, packed, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    check_close(ours, torch.nn.functional.linear(x, weight, bias), exact, BF16)
    assert torch.equal(bits(ours), bits(product(x, packed, bias)))
    assert all(torch.equal(bits(t), b) for t, b in zip((x, packed.blob), before, strict=True))


@pytest.mark.parametrize("shape", [(64, 128), (17, 256), (33, 1152), (130, 384), (3, 16384), (40, 2048)], ids=str)
def test_products(shape: tuple[int, int], isa: int) -> None:
    weight = normal(shape[0] * shape[1], BF16, 1).reshape(shape)
    bias = normal(shape[0], BF16, 2)
    for n in (1, 2, 3, 4, 5, 16, 33, 48, 64, MOST_ROWS):
        check(normal(n * shape[1], BF16, n).reshape(n, -1) * 50, weight, bias if n % 2 else None)


def test_many_escapes(isa: int) -> None:
    """One pair in eight has no code; exponents of any size, but for infinities and NaN."""
    weight = mostly_normal(48 * 512, BF16, 3)
    weight = torch.where(weight.isfinite() & (weight.abs() < 1e3), weight, 3.0).reshape(48, 512)
    packed = lossless.compress(weight, "p7")
    assert packed.header.sections[lossless.contract.Section.ESCAPE_POSITIONS][1] > 500
    for n in (1, 4, 20):
        check(normal(n * 512, BF16, 4).reshape(n, 512), weight, None)


def test_weights_that_are_no_numbers(isa: int) -> None:
    """Infinities and NaN of W, coded or escaped, come out in their rows alone."""
    weight = normal(40 * 256, BF16, 5).reshape(40, 256)
    weight[3, 7], weight[20, 100], weight[39, 255] = float("inf"), float("nan"), -float("inf")
    x = normal(5 * 256, BF16, 6).reshape(5, 256)
    ours, wanted = product(x, lossless.compress(weight, "p7"), None), torch.nn.functional.linear(x, weight)
    assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.isinf(), wanted.isinf())
    assert torch.equal(ours[:, 3], wanted[:, 3]) and torch.equal(ours[:, 39], wanted[:, 39])


def test_an_infinite_activation_is_multiplied_by_the_number_itself(isa: int) -> None:
    weight = mostly_normal(32 * 256, BF16, 7)
    weight = torch.where(weight.isfinite() & (weight.abs() > 1e-30), weight, 1.0).reshape(
        32, 256
    )  # torch: denormals are 0
    x = normal(2 * 256, BF16, 8).reshape(2, 256)
    x[0] = float("inf")
    weight = weight.abs()
    ours = product(x, lossless.compress(weight, "p7"), None)
    assert bool((ours[0] == float("inf")).all()) and bool(ours[1].isfinite().all())


def test_a_plane_of_zeros_and_a_constant(isa: int) -> None:
    """Powers of two have no sign and no mantissa: the byte plane is not stored."""
    weight = torch.pow(2.0, torch.randint(-9, -2, (20, 640))).to(BF16)
    packed = lossless.compress(weight, "p7")
    assert lossless.contract.Section.BYTES0 not in packed.header.sections
    check(normal(3 * 640, BF16, 9).reshape(3, 640), weight, None)
    check(normal(6 * 640, BF16, 9).reshape(6, 640), torch.full((20, 640), -0.75, dtype=BF16), None)


def test_any_number_of_threads(isa: int, threads: None) -> None:
    """One thread takes 64 rows of W at a time, more take 16."""
    weight = mostly_normal(300 * 384, BF16, 10)
    weight = torch.where(weight.isfinite() & (weight.abs() < 9), weight, 0.5).reshape(300, 384)
    packed = lossless.compress(weight, "p7")
    for n in (1, 7):
        x = normal(n * 384, BF16, 11).reshape(n, 384)
        made = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            made.append(bits(product(x, packed, None)))
        assert all(torch.equal(made[0], other) for other in made[1:])


def test_hostile_sections(isa: int) -> None:
    """Random bytes with a valid plan give some numbers; escapes beyond the matrix or the list are left out."""
    weight = mostly_normal(40 * 512, BF16, 12).reshape(40, 512)
    packed = lossless.compress(weight, "p7")
    x = normal(6 * 512, BF16, 13).reshape(6, 512)
    for seed in range(6):
        blob = packed.blob.clone()
        generator = torch.Generator().manual_seed(seed)
        for offset, count, _ in packed.header.sections.values():
            blob[offset : offset + count] = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        with registry.use_backend("cpp"):
            out = torch.ops.fastloss.lossless_linear(x, blob, packed.plan, None)
        assert out.shape == (6, 40)


def test_what_the_kernel_leaves_to_others() -> None:
    def why(x: Tensor, packed: lossless.CompressedTensor) -> str:
        return registry.explain("lossless_linear", x, packed.blob, packed.plan, None)

    weight = normal(48 * 256, BF16).reshape(48, 256)
    packed = lossless.compress(weight, "p7")
    assert "rows of x" in why(normal((MOST_ROWS + 1) * 256, BF16).reshape(-1, 256), packed)
    assert "rows of x" in why(normal(0, BF16).reshape(0, 256), packed)
    x = normal(2 * 256, BF16).reshape(2, 256)
    for other in (lossless.compress(weight, "r8"), lossless.compress(weight, "p7", layout="tiles")):
        assert "layout ROWS" in why(x, other)
        ours = torch.ops.fastloss.lossless_linear(x, other.blob, other.plan, None)
        assert torch.equal(ours, torch.nn.functional.linear(x, weight))
    narrow = normal(40 * 200, BF16).reshape(40, 200)
    assert "multiple of 128" in why(x[:, :200].contiguous(), lossless.compress(narrow, "p7"))
