"""BitTensor: layout, moving, saving, compiling; and the public product of two of them."""

from __future__ import annotations

import io
import pickle

import numpy
import pytest
import torch

from fastloss import quant
from fastloss.quant import BitTensor, bgemm, pack_bits, pack_codes, pack_ternary, unpack_bits


def kinds(x: torch.Tensor) -> dict[str, tuple[BitTensor, torch.Tensor]]:
    """Packed, and the integers that it should hold."""
    step = 0.4
    return {
        "binary": (pack_bits(x), torch.where(x >= 0, 1, -1)),
        "ternary": (pack_ternary(x, 0.5), (x > 0.5).int() - (x < -0.5).int()),
        "codes": (pack_codes(x, step, 4), (x / step).round().clamp(-8, 7).int()),
        "unsigned": (pack_codes(x, step, 2, signed=False), (x / step).round().clamp(0, 3).int()),
        "odd": (pack_codes(x, step, 3, odd=True), 2 * (x / step - 0.5).round().clamp(-4, 3).int() + 1),
    }


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 511, 512, 513, 700])
def test_layout_is_lsb_first_and_padded_with_zeros(columns: int) -> None:
    x = torch.randn(3, columns)
    bits = pack_bits(x)
    assert bits.planes.shape == (1, 3, 64 * -(-columns // 512)) and bits.shape == (3, columns) and bits.rows == 3
    wanted = numpy.packbits((x >= 0).numpy(), axis=1, bitorder="little")
    assert (bits.planes[0].numpy()[:, : wanted.shape[1]] == wanted).all()
    assert not bits.planes[0][:, wanted.shape[1] :].any()
    assert (bits.popcounts[0] == (x >= 0).sum(1)).all()


def test_sign_of_zero_and_nan() -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    assert unpack_bits(pack_bits(x[None]))[0].tolist() == [1, 1, -1, 1, -1, 1, -1]
    assert unpack_bits(pack_ternary(x[None], 0.5))[0].tolist() == [0, 0, 0, 1, -1, 0, 0]
    assert unpack_bits(pack_codes(x[None], 1.0, 3))[0].tolist() == [0, 0, -4, 3, -4, 0, 0]


@pytest.mark.parametrize("kind", ["binary", "ternary", "codes", "unsigned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_integers_come_back(kind: str, dtype: torch.dtype) -> None:
    bits, wanted = kinds(torch.randn(2, 5, 130).to(dtype).double())[kind]
    assert (unpack_bits(bits, torch.int32) == wanted).all()


@pytest.mark.parametrize("right", ["binary", "ternary", "codes", "unsigned", "odd"])
@pytest.mark.parametrize("left", ["binary", "ternary", "codes", "unsigned", "odd"])
def test_products_of_all_kinds(left: str, right: str) -> None:
    a, of_a = kinds(torch.randn(2, 3, 523))[left]
    b, of_b = kinds(torch.randn(9, 523))[right]
    exact = bgemm(a._replace(scale=None), b._replace(scale=None))
    assert exact.dtype == torch.int32 and exact.shape == (2, 3, 9)
    assert (exact == (of_a.long() @ of_b.long().T)).all()


def test_epilogue() -> None:
    x, w, bias = torch.randn(4, 100), torch.randn(6, 100), torch.randn(6)
    a, b = pack_bits(x, scale=torch.rand(4)), pack_bits(w, scale=torch.rand(6))
    wanted = unpack_bits(a).double() @ unpack_bits(b).double().T + bias
    assert torch.allclose(bgemm(a, b, bias).double(), wanted, rtol=1e-6, atol=1e-5)
    for name in ("relu", "hardtanh", "silu"):
        got = bgemm(a, b, bias, activation=name, dtype=torch.bfloat16)
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.double(), getattr(torch.nn.functional, name)(wanted), rtol=1e-2, atol=1e-2)
    signs = bgemm(a, b, bias, packed=True)
    assert isinstance(signs, BitTensor) and (unpack_bits(signs) == torch.where(wanted >= 0, 1.0, -1.0)).all()


@pytest.mark.parametrize("kind", ["binary", "ternary", "codes"])
def test_saved_loaded_pickled_moved(kind: str) -> None:
    bits = kinds(torch.randn(3, 77))[kind][0]
    file = io.BytesIO()
    torch.save({"w": bits}, file)
    file.seek(0)
    for other in (torch.load(file)["w"], pickle.loads(pickle.dumps(bits)), bits.to("cpu"), bits.to("meta")):
        assert isinstance(other, BitTensor) and other.shape == bits.shape and other.weights == bits.weights
        if other.device.type == "cpu":
            assert (unpack_bits(other) == unpack_bits(bits)).all()


def test_compiles_whole_and_is_a_pytree() -> None:
    x, w = torch.randn(5, 90), pack_bits(torch.randn(8, 90), scale=0.5)

    def layer(x: torch.Tensor, w: BitTensor) -> torch.Tensor:
        hidden = bgemm(quant.binarize(x, packed=True), w)
        return unpack_bits(quant.pack_bits(hidden)) * hidden

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), layer(x, w))
    moved = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, w)
    assert isinstance(moved, BitTensor) and torch.equal(moved.planes, w.planes)


def test_bytes() -> None:
    bits = pack_bits(torch.randn(64, 4096))
    assert bits.nbytes == 64 * 4096 // 8 + 64 * 4  # and the popcounts


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: pack_bits(x.int()), TypeError, "floating"),
        (lambda x: pack_bits(torch.zeros(3, 0)), ValueError, "at least one column"),
        (lambda x: pack_bits(x, center=torch.zeros(7)), ValueError, "center must hold"),
        (lambda x: pack_codes(x, 1.0, 5), ValueError, "1 to 4, got 5"),
        (lambda x: pack_codes(x, 1.0, 2, group=32), ValueError, "multiple of 64, got 32"),
        (lambda x: bgemm(x, pack_bits(x)), TypeError, "a must be a BitTensor"),
        (lambda x: bgemm(pack_bits(x), pack_bits(x[:, :50])), ValueError, "K"),
        (lambda x: bgemm(pack_bits(x), pack_bits(x[None])), ValueError, "K"),
        (lambda x: bgemm(pack_bits(x), pack_bits(x), activation="tanh"), ValueError, "'tanh'"),
        (lambda x: bgemm(pack_bits(x), pack_bits(x), torch.zeros(3)), ValueError, "bias must be"),
        (lambda x: bgemm(pack_bits(x, scale=2.0), pack_bits(x), dtype=torch.int32), ValueError, "int32"),
        (lambda x: bgemm(pack_bits(x), pack_bits(x), dtype=torch.int64), TypeError, "int64"),
        (lambda x: bgemm(pack_bits(x), pack_codes(x, 1.0, 2, group=64)), ValueError, "groups"),
        (lambda x: unpack_bits(pack_bits(x)._replace(columns=600)), ValueError, "600 columns"),
        (lambda x: unpack_bits(pack_bits(x)._replace(popcounts=torch.zeros(1, 4))), TypeError, "int32"),
        (lambda x: unpack_bits(pack_bits(x)._replace(scale=torch.ones(3, 1))), ValueError, "scale"),
    ],
)
def test_errors_name_what_was_given(call, error, says) -> None:
    x = torch.randn(4, 100)
    before = x.clone()
    with pytest.raises(error, match=says):
        call(x)
    assert torch.equal(x, before)
