"""`compressed_linear`: bit for bit what F.linear computes, under every transform, with nothing dense kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import registry
from fastloss.lossless import CompressedTensor, compress, compressed_linear, crossover
from lossless_layers import COLUMNS, DTYPES, ROWS, matrix, pair, same
from tolerance import check_close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["p7", "r8", "raw"])
def test_output_and_gradients_equal_the_dense_ones_bit_for_bit(dtype: torch.dtype, codec: str) -> None:
    w, b = matrix(dtype, 16 if codec == "r8" else ROWS), matrix(dtype, 1, 16 if codec == "r8" else ROWS)[0]
    packed = compress(w, codec)
    for shape in ((COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS), (1, 2, 3, COLUMNS), (0, COLUMNS)):
        for bias in (None, b):
            found = []
            for run in (lambda x, c: F.linear(x, w, c), lambda x, c: compressed_linear(x, packed, c)):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
                c = None if bias is None else bias.clone().requires_grad_()
                y = run(x, c)
                grads = torch.autograd.grad(y.float().square().sum(), [t for t in (x, c) if t is not None])
                found.append((y.detach(), *grads))
            for ours, dense in zip(found[1], found[0], strict=True):
                same(ours, dense)


def test_nothing_dense_is_saved_for_the_backward() -> None:
    packed = compress(matrix(torch.bfloat16))
    x = torch.randn(3, COLUMNS).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        compressed_linear(x, packed)
    assert [t.data_ptr() for t in saved] == [packed.blob.data_ptr()]


def test_second_derivatives() -> None:
    w, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
    x, packed = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), compress(w)
    assert torch.autograd.gradcheck(lambda x, b: compressed_linear(x, packed, b), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: compressed_linear(x, packed, b).sin(), (x, b))


def test_transforms() -> None:
    w, b = matrix(), matrix(rows=1, columns=ROWS)[0]
    packed, x = compress(w), torch.randn(4, 3, COLUMNS)
    func = torch.func

    def ours(x: Tensor, b: Tensor = b) -> Tensor:
        return compressed_linear(x, packed, b)

    def dense(x: Tensor, b: Tensor = b) -> Tensor:
        return F.linear(x, w, b)

    many = torch.randn(4, ROWS)
    for transform in (
        lambda f: func.vmap(f)(x),
        lambda f: func.vmap(f, in_dims=1, out_dims=1)(x),
        lambda f: func.vmap(f, (0, 0))(x, many),
        lambda f: func.vmap(f, (None, 0))(x[0], many),
        lambda f: func.vmap(func.grad(lambda x: f(x).sin().sum()))(x),
        lambda f: func.jvp(f, (x, b), (x.cos(), b.sin()))[1],
        lambda f: func.jvp(lambda b: f(x, b), (b,), (b.sin(),))[1],
        lambda f: func.jacrev(f)(x[0, 0]),
        lambda f: func.jacfwd(f)(x[0, 0]),
        lambda f: func.hessian(lambda x: f(x).sin().sum())(x[0, 0]),
    ):
        torch.testing.assert_close(transform(ours), transform(dense), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="vmap over compressed weights"):
        func.vmap(
            lambda blob: compressed_linear(x[0], CompressedTensor(blob, packed.header)),
        )(torch.stack([packed.blob] * 2))


def test_autocast_takes_what_linear_takes() -> None:
    dense, layer = pair()
    x = torch.randn(3, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        same(layer(x), dense(x))
        same(layer(x.bfloat16()), dense(x.bfloat16()))
    found = []
    for model in (dense, layer):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(given).float().square().sum()
        found.append((*torch.autograd.grad(y, (given, model.bias)),))
    same(found[1][0], found[0][0])
    same(found[1][1], found[0][1])


def test_compiled_whole_with_any_number_of_rows() -> None:
    dense, layer = pair()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 8):
        x = torch.randn(n, COLUMNS)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(a).square().sum().backward()
        dense(b).square().sum().backward()
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
        dense.zero_grad()


def test_compiled_graph_keeps_the_blob_not_the_weight() -> None:
    """The forward and the backward graph decode in one op each: a weight they shared would be kept dense in between."""
    packed = compress(matrix())
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.nbytes)
        return t

    compiled = torch.compile(lambda x: compressed_linear(x, packed).square(), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        compiled(torch.randn(3, COLUMNS, requires_grad=True)).sum().backward()
    assert saved and matrix().nbytes not in saved and max(saved) <= packed.nbytes


@pytest.mark.parametrize("codec", ["p7", "raw"])
def test_opcheck(codec: str) -> None:
    w = matrix(torch.bfloat16)
    p, x = compress(w, codec), torch.randn(3, COLUMNS).bfloat16()
    o = torch.ops.fastloss
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (o.lossless_decode, (p.blob, p.plan, 64, 640, p.dtype)),
        (o.lossless_rows, (p.blob, p.plan, torch.tensor([3, 3, 0]), p.dtype)),
        (o.lossless_linear, (x, p.blob, p.plan, w[:, 0].clone())),
        (o.crc32c, (p.blob, 100)),
        (o.compressed_linear, (x, p.blob, p.plan, p.dtype, w[:, 0].clone(), "exact")),
        (o.compressed_linear_backward, (x[:, :ROWS], p.blob, p.plan, p.dtype)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_fused_and_auto_are_within_rounding_and_auto_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, b, x = matrix(torch.bfloat16), matrix(torch.bfloat16, 1, ROWS)[0], torch.randn(7, COLUMNS).bfloat16()
    packed = compress(w)
    truth = F.linear(x.double(), w.double(), b.double())
    for mode in ("fused", "auto"):
        check_close(compressed_linear(x, packed, b, mode), F.linear(x, w, b), truth, torch.bfloat16)
    assert crossover._measure(x, packed.blob, packed.plan, b) in (True, False)
    measured: list[int] = []

    def measure(*operands: Any) -> bool:
        measured.append(operands[0].shape[0])
        return True

    monkeypatch.setattr(crossover, "_measure", measure)
    monkeypatch.setattr(registry, "choose", lambda *_: "cpp")
    monkeypatch.setattr(registry, "able", lambda *_: True)
    crossover.forget()
    for n in (7, 8, 5, 9):
        compressed_linear(x[:1].expand(n, -1), packed, b, "auto")
    assert measured == [7, 9] and set(crossover.winners().values()) == {True}
    crossover.forget()
    torch.use_deterministic_algorithms(True)
    try:
        compressed_linear(x, packed, b, "auto")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not crossover.winners()
    assert not crossover.fused_wins(x.float(), compress(w.float(), "raw").blob, compress(w.float(), "raw").plan, None)


def test_wrong_arguments() -> None:
    packed, x = compress(matrix()), torch.randn(2, COLUMNS)
    with pytest.raises(TypeError, match="must be a CompressedTensor, got Tensor"):
        compressed_linear(x, matrix())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a matrix"):
        compressed_linear(x, compress(torch.randn(4)))
    with pytest.raises(ValueError, match=r"x must be \[..., 128\], got \[2, 5\]"):
        compressed_linear(x[:, :5], packed)
    with pytest.raises(TypeError, match=r"must be torch\.float32 .* got torch\.float16"):
        compressed_linear(x.half(), packed)
    with pytest.raises(ValueError, match="mode must be one of exact, auto, fused, got 'fast'"):
        compressed_linear(x, packed, mode="fast")
