"""Softmax-aware binary attention against the dense formula, and its inference on bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss.quant import binary_attention, softmax_aware_binarize, unpack_bits
from fastloss.quant.layers import BinaryAttention, PackedBinaryLinear, pack_model
from surrogate_functions import signed


def through_softmax(scores: Tensor, beta: float = 0.25) -> Tensor:
    """The definition: a threshold on the softmax, with the softmax's gradient."""
    a = torch.softmax(scores, -1)
    b = (a >= beta * a.amax(-1, keepdim=True)).to(a.dtype)
    return a + (b - a).detach()


@pytest.mark.parametrize("beta", [0.25, 0.5, 0.01, 1.0])
def test_binarize_is_a_threshold_on_the_softmax(beta: float) -> None:
    scores = 3 * torch.randn(2, 5, 33, dtype=torch.float64)
    scores.requires_grad_()
    ours, wanted = softmax_aware_binarize(scores, beta), through_softmax(scores, beta)
    assert isinstance(ours, Tensor) and torch.equal(ours, wanted.round())
    gradient = torch.randn_like(wanted)
    a, b = (torch.autograd.grad(y, scores, gradient)[0] for y in (ours, wanted))
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    bits = softmax_aware_binarize(scores, beta, packed=True)
    assert not isinstance(bits, Tensor) and torch.equal(unpack_bits(bits, torch.int32), ours.int())


def test_hard_rows() -> None:
    inf, nan = math.inf, math.nan
    scores = torch.tensor([[0.0, -inf, -0.5], [-inf, -inf, -inf], [nan, 1.0, 2.0], [inf, 1.0, inf]], requires_grad=True)
    b = softmax_aware_binarize(scores)
    assert isinstance(b, Tensor) and b.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 1]]
    bits = softmax_aware_binarize(scores, packed=True)
    assert not isinstance(bits, Tensor) and torch.equal(unpack_bits(bits), b)
    b[:2].sum().backward()
    assert scores.grad is not None and scores.grad[:2].isfinite().all()


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, values: bool) -> Tensor:
    scores = signed(q, "clip") @ signed(k, "clip").transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return through_softmax(scores) @ (signed(v, "clip") if values else v)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_attention(lead: tuple[int, ...], kind: str, values: bool) -> None:
    q, k, v = (torch.randn(*lead, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((7, 40), (9, 40), (9, 5)))
    mask = {"none": None, "bool": torch.rand(7, 9) > 0.3, "float": torch.randn(7, 9, dtype=torch.float64)}[kind]
    if kind == "bool" and mask is not None:
        mask[:, 0] = True
    wanted = dense(q, k, v, mask, 40**-0.5, values)
    ours = binary_attention(q, k, v, mask, binary_values=values)
    assert torch.allclose(ours, wanted, atol=1e-12)
    gradient = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), gradient) for y in (ours, wanted)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(binary_attention(q, k, v, mask, binary_values=values), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_is_equal(dtype: torch.dtype) -> None:
    """Sums of signs are integers: bits or not, the result is the same."""
    q, k, v = (torch.randn(2, 4, 20, 64).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    trained = binary_attention(q, k, v, mask)
    with torch.no_grad():
        assert torch.equal(binary_attention(q, k, v, mask), trained)
    blind = mask.clone()
    blind[3] = False
    assert not binary_attention(q, k, v, blind)[:, :, 3].any()


@pytest.mark.parametrize("options", [{}, {"center": True, "scale": "learned"}])
def test_module(options: dict[str, Any]) -> None:
    module = BinaryAttention(64, 4, **options)
    x = torch.randn(2, 9, 64, requires_grad=True)
    y = module(x)
    q, k, v = (layer(x).reshape(2, 9, 4, 16).transpose(1, 2) for layer in (module.q_proj, module.k_proj, module.v_proj))
    wanted = module.out_proj(binary_attention(q, k, v).transpose(1, 2).reshape(2, 9, 64))
    assert torch.equal(y, wanted)
    y.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if n != "k_proj.bias"
    )
    packed = pack_model(module)
    assert isinstance(packed.q_proj, PackedBinaryLinear) and not list(packed.parameters())
    assert torch.equal(packed(x), y) and "num_heads=4" in repr(packed)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    module, x = BinaryAttention(32, 2), torch.randn(1, 5, 32)
    assert torch.allclose(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    with torch.no_grad():
        assert torch.allclose(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_empty() -> None:
    with torch.no_grad():
        assert binary_attention(torch.randn(0, 3, 8), torch.randn(0, 4, 8), torch.randn(0, 4, 5)).shape == (0, 3, 5)
        assert binary_attention(torch.randn(2, 0, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 5)).shape == (2, 0, 5)


def test_refusals() -> None:
    q = torch.randn(2, 3, 8)
    for arguments, message in (
        ((q, q, torch.randn(2, 4, 8)), "q, k and v must be"), ((q, torch.randn(2, 3, 9), q), "q, k and v must be"),
        ((q, q[:, :0], q[:, :0]), "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            binary_attention(*arguments)
    with pytest.raises(ValueError, match="beta must be"):
        binary_attention(q, q, q, beta=0.0)
    with pytest.raises(TypeError, match="k must be"):
        binary_attention(q, q.int(), q)
    with pytest.raises(TypeError, match="scores must be"):
        softmax_aware_binarize(q.int())
    with pytest.raises(ValueError, match="at least one column"):
        softmax_aware_binarize(torch.randn(3, 0))
    with pytest.raises(ValueError, match="num_heads must divide"):
        BinaryAttention(10, 3)
    with pytest.raises(ValueError, match="x must be"):
        BinaryAttention(8, 2)(torch.randn(2, 3, 9))


@pytest.mark.parametrize("training", [False, True])
def test_a_float32_mask_for_16_bits(training: bool) -> None:
    q, k, v = (torch.randn(2, 5, 16).half() for _ in range(3))
    mask = torch.randn(5, 5)
    y = binary_attention(q.requires_grad_(training), k, v, mask)
    assert y.dtype == torch.float16 and torch.equal(y, binary_attention(q, k, v, mask.half()))
