"""`kernel_hash` against its formula with all differences, `learn_hash` against autograd and torch's SGD, the module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss.quant import BitTensor, hash_attention, kernel_hash, learn_hash, unpack_bits
from fastloss.quant.layers import HashAttention
from fastloss.quant.learn_hash import similarity_labels

B, H, N, D, M, BITS = 2, 3, 40, 8, 7, 5


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, anchors = torch.randn(B, H, N, D, dtype=dtype), torch.randn(H, M, D, dtype=dtype)
    return (
        x,
        anchors / anchors.norm(dim=-1, keepdim=True),
        torch.randn(H, BITS, M, dtype=dtype),
        torch.rand(H, M, dtype=dtype),
    )


def kernels(x: Tensor, anchors: Tensor, bandwidth: Tensor | None = None, normalize: bool = True) -> Tensor:
    """kappa with all differences [B, H, N, m, D]."""
    x = x / x.norm(dim=-1, keepdim=True) if normalize else x
    distances = (x[..., None, :] - anchors[..., None, :, :]).square().sum(-1)
    sigma = distances.mean((-2, -1)) if bandwidth is None else bandwidth.expand(x.shape[:2])
    return torch.exp(-distances / (2 * sigma[..., None, None]))


def sums(x: Tensor, anchors: Tensor, projection: Tensor, mean: Tensor, **more: object) -> Tensor:
    return torch.einsum("bhnm,hkm->bhnk", kernels(x, anchors, **more) - mean[:, None], projection)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bandwidth", [None, torch.tensor(0.7), torch.rand(H) + 0.3, torch.rand(B, H) + 0.3])
def test_formula(bandwidth: Tensor | None, normalize: bool) -> None:
    x, *rest = operands()
    x.requires_grad_()
    u = sums(x, *rest, bandwidth=bandwidth, normalize=normalize)
    codes = kernel_hash(x, *rest, bandwidth=bandwidth, normalize=normalize)
    assert isinstance(codes, Tensor) and torch.equal(codes, torch.where(u >= 0, 1.0, -1.0).double())
    grad = torch.randn_like(u)
    (got,) = torch.autograd.grad(codes, x, grad)
    (wanted,) = torch.autograd.grad(torch.nn.functional.hardtanh(u), x, grad)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    packed = kernel_hash(x, *rest, bandwidth=bandwidth, normalize=normalize, packed=True)
    assert isinstance(packed, BitTensor) and torch.equal(unpack_bits(packed, torch.float64), codes)


def test_shared_anchors_and_dtypes() -> None:
    x, anchors, projection, mean = operands(torch.float32)
    shared = kernel_hash(x, anchors[0], projection, mean)
    assert isinstance(shared, Tensor)
    assert torch.equal(shared, kernel_hash(x, anchors[:1].expand(H, M, D), projection, mean))
    half = kernel_hash(x.bfloat16(), anchors, projection, mean)
    exact = kernel_hash(x.bfloat16().float(), anchors, projection, mean)
    assert half.dtype == torch.bfloat16 and torch.equal(half.float(), exact)  # type: ignore[union-attr,arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        cast = kernel_hash(x, anchors, projection, mean)
    assert torch.equal(cast, kernel_hash(x, anchors, projection, mean))  # type: ignore[arg-type]


def test_tokens_that_are_the_anchors() -> None:
    """Distances that round to less than 0, and a bandwidth of 0: codes are those of kappa = 1."""
    token = torch.randn(1, 1, 1, 64)
    anchors = torch.nn.functional.normalize(token[0, 0], dim=-1)
    projection = torch.tensor([[[1.0], [-1.0]]])
    x = token.expand(1, 1, 9, 64).clone().requires_grad_()
    codes = kernel_hash(x, anchors, projection, torch.full((1, 1), 0.5))
    assert torch.equal(codes, torch.tensor([1.0, -1.0]).expand(1, 1, 9, 2))  # type: ignore[arg-type]
    codes.sum().backward()  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.isfinite().all()


def test_compiles() -> None:
    x, *rest = operands(torch.float32)
    compiled = torch.compile(kernel_hash, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *rest), kernel_hash(x, *rest))  # type: ignore[arg-type]


def learned_slowly(kappa: Tensor, labels: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """One bit by autograd and torch.optim.SGD: (weight of each head, S of the next bit)."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        y = 2 * torch.sigmoid(torch.einsum("bhnm,hm->bhn", kappa, weight)) - 1
        (-torch.einsum("bhn,bhnl,bhl->bh", y, labels, y) / (N * BITS)).mean().backward()
        optimizer.step()
    chosen, signs = [], []
    for h in range(H):
        tried = []
        for w in (start[h], weight[h].detach()):
            y = torch.where(kappa[:, h] @ w >= 0, 1.0, -1.0).double()
            tried.append((float(torch.einsum("bn,bnl,bl->", y, labels[:, h], y)), w, y))
        best = tried[1] if tried[1][0] > tried[0][0] else tried[0]
        chosen.append(best[1])
        signs.append(best[2])
    y = torch.stack(signs, 1)
    return torch.stack(chosen), labels - y[..., None] * y[..., None, :]


def test_learning() -> None:
    x, anchors, *_ = operands()
    projection, mean = learn_hash(
        x, anchors, bits=BITS, topk=3, steps=20, learning_rate=0.01, generator=torch.Generator().manual_seed(4)
    )
    kappa = kernels(x, anchors)
    torch.testing.assert_close(mean, kappa.mean((0, 2)))
    kappa = kappa - kappa.mean((0, 2))[:, None]
    labels = BITS * similarity_labels(x / x.norm(dim=-1, keepdim=True), 3)
    generator = torch.Generator().manual_seed(4)
    for bit in range(BITS):
        start = torch.randn(H, M, generator=generator, dtype=torch.float64)
        wanted, labels = learned_slowly(kappa, labels, start, 20)
        torch.testing.assert_close(projection[:, bit], wanted, rtol=1e-8, atol=1e-8)


def test_labels() -> None:
    x = torch.randn(1, 1, 6, 4)
    labels, products = similarity_labels(x, 2)[0, 0], (x @ x.mT)[0, 0]
    order = products.argsort(-1)
    for i in range(6):
        assert {int(j) for j in (labels[i] == -1).nonzero()} == {int(j) for j in order[i, :2]}
        assert {int(j) for j in (labels[i] == 1).nonzero()} == {int(j) for j in order[i, 4:]}


def test_learned_codes_follow_the_products() -> None:
    """What the greedy learning makes small, |bits S - codes codesᵀ|, of tokens of a few clusters, against random bits."""
    centers = torch.randn(6, 16)
    x = (centers[torch.randint(0, 6, (2, 60))] + 0.3 * torch.randn(2, 60, 16))[:, None]
    layer = HashAttention(1, 16, bits=16, supports=20)
    generator = torch.Generator().manual_seed(1)
    layer.learn(x, topk=8, learning_rate=0.5, generator=generator)
    labels = similarity_labels(torch.nn.functional.normalize(x, dim=-1), 8)

    def left(projection: Tensor) -> float:
        codes = kernel_hash(x, layer.anchors, projection, layer.mean)
        return float((16 * labels - codes @ codes.mT).square().mean())  # type: ignore[union-attr,operator]

    assert left(layer.projection) < 0.8 * left(torch.randn(1, 16, 20, generator=generator))


def test_module() -> None:
    layer = HashAttention(H, D, bits=BITS, supports=M, causal=True)
    x, v = torch.randn(B, H, N, D, requires_grad=True), torch.randn(B, H, N, 6, requires_grad=True)
    layer.learn(x.detach(), topk=4)
    out = layer(x, v)
    assert torch.equal(out, hash_attention(layer.codes(x), layer.codes(x), v, causal=True))
    out.square().sum().backward()
    assert x.grad is not None and v.grad is not None and bool(x.grad.any()) and not list(layer.parameters())
    other = HashAttention(H, D, bits=BITS, supports=M, causal=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, v), out)
    apart = HashAttention(H, D, bits=BITS, supports=M)(x, v[:, :, :9], x[:, :, :9])
    assert apart.shape == (B, H, N, 6) and "supports=7" in repr(layer)


def test_errors() -> None:
    x, anchors, projection, mean = operands(torch.float32)
    with pytest.raises(ValueError, match=r"x and anchors must be \[B, H, N, D\]"):
        kernel_hash(x[0], anchors, projection, mean)
    with pytest.raises(ValueError, match="anchors must be of 3 heads"):
        kernel_hash(x, anchors[:2], projection, mean)
    with pytest.raises(TypeError, match=r"x must be a floating tensor, got torch\.int64"):
        kernel_hash(x.long(), anchors, projection, mean)
    with pytest.raises(ValueError, match=r"projection must be \[3, bits, 7\], got \[3, 5, 6\]"):
        kernel_hash(x, anchors, projection[..., :6], mean)
    with pytest.raises(ValueError, match=r"mean must be \[3, 7\], got \[7\]"):
        kernel_hash(x, anchors, projection, mean[0])
    with pytest.raises(ValueError, match=r"bandwidth must be one number, \[3\] or \[2, 3\], got \[4\]"):
        kernel_hash(x, anchors, projection, mean, bandwidth=torch.ones(4))
    with pytest.raises(ValueError, match="topk must be 1 to half of the tokens"):
        learn_hash(x, anchors, topk=21)
    with pytest.raises(ValueError, match="bits must be at least 1"):
        learn_hash(x, anchors, bits=0)
    with pytest.raises(ValueError, match="bias must be one of"):
        HashAttention(2, 4, bias="own")
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        HashAttention(0, 4)
    with pytest.raises(ValueError, match=r"at least 25 tokens, got \[2, 3, 5, 8\]"):
        HashAttention(H, D).learn(x[:, :, :5])
