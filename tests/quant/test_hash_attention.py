"""`hash_attention` against the dense matrix of weights in float64: forms, gradients, dtypes, every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.quant import hash_attention, pack_bits, selftest
from tolerance import check_close

FORMS = [(bias, causal) for bias in ("sum", "self") for causal in (False, True)]
#: batch and heads, queries, keys, bits, columns of v
SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 7, 7, 3, 5),
    (2, 130, 130, 16, 64),
    (1, 67, 67, 17, 33),
    (2, 300, 300, 40, 20),
    (1, 5, 5, 8, 0),
)


def codes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(0, 2, shape).to(dtype) * 2 - 1


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, shift: float = 0.0) -> list[Tensor]:
    g, n, m, bits, columns = shape
    made = [codes(g, n, bits), codes(g, m, bits), torch.randn(g, m, columns, dtype=torch.float64) + shift]
    return [t.to(dtype).requires_grad_() for t in made]


def dense(q: Tensor, k: Tensor, v: Tensor, bias: str = "sum", causal: bool = False) -> Tensor:
    """The formula with all its weights."""
    b = q.shape[-1] + 1
    products = q @ k.mT
    seen = torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    d = torch.where(seen, products + b, 0).sum(-1, keepdim=True)
    weights = products + b if bias == "sum" else products + b * torch.eye(q.shape[-2], dtype=q.dtype)
    return torch.where(seen, weights, 0) @ v / d


@pytest.mark.parametrize(("bias", "causal"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape: tuple[int, ...], bias: str, causal: bool) -> None:
    given = operands(shape)
    out, expected = hash_attention(*given, bias=bias, causal=causal), dense(*given, bias, causal)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    if out.numel():
        grad = torch.randn_like(out)
        for got, wanted in zip(
            torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, given, grad), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_more_keys_than_queries() -> None:
    for shape in ((2, 5, 90, 6, 4), (2, 90, 5, 6, 4)):
        given = operands(shape)
        out, expected = hash_attention(*given), dense(*given)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(out)
        for got, wanted in zip(
            torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, given, grad), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("bias", "causal"), FORMS)
def test_second_derivatives(bias: str, causal: bool) -> None:
    given = operands((1, 4, 4, 3, 2))
    assert torch.autograd.gradgradcheck(lambda *t: hash_attention(*t, bias=bias, causal=causal), given)


def test_functional_transforms() -> None:
    given = [t.detach() for t in operands((2, 9, 9, 4, 3))]

    def total(*t: Tensor) -> Tensor:
        return hash_attention(*t, causal=True).square().sum()

    got = torch.func.grad(total, argnums=(0, 1, 2))(*given)
    wanted = torch.func.grad(lambda *t: dense(*t, causal=True).square().sum(), argnums=(0, 1, 2))(*given)
    torch.testing.assert_close(got, wanted)
    _, moved = torch.func.jvp(lambda v: hash_attention(given[0], given[1], v), (given[2],), (given[2],))
    torch.testing.assert_close(moved, dense(*given))


def test_packed_codes_and_leading_dimensions() -> None:
    q, k, v = codes(2, 3, 12, 16), codes(2, 3, 12, 16), torch.randn(2, 3, 12, 8, dtype=torch.float64)
    wanted = dense(q, k, v)
    torch.testing.assert_close(hash_attention(pack_bits(q), pack_bits(k), v), wanted)
    spread = hash_attention(q.transpose(0, 1).contiguous().transpose(0, 1), k, v.mT.contiguous().mT)
    torch.testing.assert_close(spread, wanted)


def test_autocast_and_compile() -> None:
    q, k, v = operands((2, 40, 40, 16, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = hash_attention(q, k, v)
    half = hash_attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, half)
    with registry.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        check_close(hash_attention(q, k, v), half, dense(q.double(), k.double(), v.double()), torch.bfloat16)
    compiled = torch.compile(hash_attention, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v, causal=True).sum(), (q, k, v)) for f in (compiled, hash_attention)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", ["hash_attention", "hash_attention_backward"])
def test_opcheck(op: str) -> None:
    given = selftest.arguments(op, torch.randn(12, 8), torch.randn(30, 8))
    torch.library.opcheck(getattr(torch.ops.fastloss, op).default, given)


def test_errors() -> None:
    q, k, v = (t.detach() for t in operands((2, 5, 5, 4, 3)))
    with pytest.raises(ValueError, match=r"bias must be one of sum, self, got 'own'"):
        hash_attention(q, k, v, bias="own")
    with pytest.raises(ValueError, match=r"\[2, 5, 4\], \[2, 5, 3\] and \[2, 5, 3\]"):
        hash_attention(q, k[..., :3], v)
    with pytest.raises(ValueError, match=r"\[2, 5, 4\], \[1, 5, 4\]"):
        hash_attention(q, k[:1], v)
    for more in ({"causal": True}, {"bias": "self"}):
        with pytest.raises(ValueError, match="as many queries as keys"):
            hash_attention(q[:, :3], k, v, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one bit and one key"):
        hash_attention(q, k[:, :0], v[:, :0])
    with pytest.raises(TypeError, match=r"q_codes must be a floating tensor or a BitTensor, got torch\.int64"):
        hash_attention(q.long(), k, v)
    with pytest.raises(TypeError, match=r"v must be a floating tensor, got torch\.int64"):
        hash_attention(q, k, v.long())
    assert hash_attention(q[:, :0], k, v).shape == (2, 0, 3)


ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
compiled_only = pytest.mark.skipif(_C is None, reason=str(MISSING))


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each level of csrc/cpu/cpu.h in turn, forced."""
    best = _C.best_isa()  # type: ignore[union-attr]
    if request.param > best:
        pytest.skip(f"needs {ISAS[request.param]}; the best of this machine is {_C.isa_name(best)}")  # type: ignore[union-attr]
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_kernel(backend: str, shape: tuple[int, ...], dtype: torch.dtype, bias: str, causal: bool) -> None:
    """Result and gradients of a backend against torch's composition of the same dtype, both against float64."""
    given = operands(shape, dtype, shift=0.3)
    wide = [t.detach().double().requires_grad_() for t in given]
    same = [t.detach().requires_grad_() for t in given]
    with registry.use_backend(backend):
        out = hash_attention(*given, bias=bias, causal=causal)
        grad = torch.randn(out.shape).to(dtype)
        made: tuple[Tensor, ...] = torch.autograd.grad(out, given, grad)
    exact, ours = dense(*wide, bias, causal), dense(*same, bias, causal)
    made, peers = (out, *made), (ours, *torch.autograd.grad(ours, same, grad))
    right = (exact, *torch.autograd.grad(exact, wide, grad.double()))
    sizes = magnitudes(*(t.detach() for t in (*wide, grad.double(), exact)), bias, causal)
    for got, by_torch, wanted, size in zip(made, peers, right, sizes, strict=True):
        error, by_peer = (got.double() - wanted).abs(), (by_torch.double() - wanted).abs()
        bad = error > 1.25 * by_peer + 4 * torch.finfo(dtype).eps * size
        assert got.dtype == dtype and not bad.any(), (
            f"{int(bad.sum())} of {bad.numel()} wrong, the worst by {error.max():.3g}"
        )


def magnitudes(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, bias: str, causal: bool
) -> tuple[Tensor, ...]:
    """Sums of the magnitudes of the terms of out, dq, dk and dv, which cancel: signs do, and weights sum to 1 whatever the
    codes."""
    b, products = q.shape[-1] + 1, q @ k.mT
    seen = torch.ones_like(products[0]).tril() if causal else torch.ones_like(products[0])
    d = ((products + b) * seen).sum(-1, keepdim=True)
    weights = (q.abs() @ k.abs().mT + (b if bias == "sum" else b * torch.eye(len(seen), dtype=q.dtype))) * seen / d
    terms = (grad.abs() @ v.abs().mT + (grad * out).abs().sum(-1, keepdim=True)) * seen / d
    return weights @ v.abs(), terms.sum(-1)[..., None], terms.sum(-2)[..., None], weights.mT @ grad.abs()


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_kernels(isa: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for bias, causal in FORMS:
        check_kernel("cpp", shape, dtype, bias, causal)


@compiled_only
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_and_threads(count: int, threads: None) -> None:
    """Several blocks of tokens, forwards and backwards; two runs give the same bits."""
    torch.set_num_threads(count)
    for bias, causal in FORMS:
        check_kernel("cpp", (1, 1100, 1100, 5, 6), torch.float32, bias, causal)
    check_kernel("cpp", (2, 20, 1300, 9, 3), torch.float32, "sum", False)
    given = operands((2, 1500, 1500, 16, 32), torch.float32)
    first, second = (hash_attention(*given, causal=True) for _ in range(2))
    assert torch.equal(first, second)


@compiled_only
def test_numbers_that_are_no_codes() -> None:
    """The op is the formula of any numbers: +0.5 and weights that do not sum to an integer."""
    q, k, v = (torch.rand(2, 70, n) for n in (12, 12, 40))
    out = hash_attention(q, k, v)
    check_close(out, dense(q, k, v), dense(q.double(), k.double(), v.double()), torch.float32)


def test_backends_say_what_they_do_not_take() -> None:
    given = [t.detach() for t in operands((1, 3, 3, 2, 2))]
    said = fastloss.explain("hash_attention", *given, False, False)
    assert "takes float32, float16 or bfloat16" in said
