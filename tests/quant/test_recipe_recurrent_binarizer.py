"""Recurrent binarisation (BEBR) against dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.quant import pack_bits, pack_codes, unpack_bits
from fastloss.quant.recipes import (
    RecurrentBinarizer,
    inverse_norms,
    pack_recurrent,
    recurrent_binarizer_loss,
    symmetric_distance_topk,
)


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class ClipSign(torch.autograd.Function):
    """sign with the gradient of hardtanh, written out."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * (ctx.saved_tensors[0].abs() < 1)


def dense_codes(module: RecurrentBinarizer, x: Tensor) -> Tensor:
    b = ClipSign.apply(module.binarized(x))
    for i in range(module.steps):
        f = module.restored[i](b)
        f = f / f.norm(dim=1, keepdim=True)
        b = b + ClipSign.apply(module.residual[i](x - f)) / 2 ** (i + 1)
    return b


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_codes_and_gradients(steps: int) -> None:
    module, x = RecurrentBinarizer(10, 12, 20, steps).double(), torch.randn(16, 10, dtype=torch.float64)
    weight = torch.randn(16, 12, dtype=torch.float64)
    b, expected = module(x), dense_codes(module, x)
    assert torch.equal(b, expected)
    parameters = list(module.parameters())
    ours = torch.autograd.grad((b * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, t in zip(ours, theirs, strict=True):
        assert torch.allclose(a, t, rtol=1e-10, atol=1e-10)
    levels = torch.arange(1 - 2 ** (steps + 1), 2 ** (steps + 1), 2) / 2**steps
    assert set(b.unique().tolist()) <= set(levels.tolist())


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_packed_codes_are_the_numbers(steps: int) -> None:
    module, x = RecurrentBinarizer(6, 70, 8, steps).eval(), torch.randn(9, 6)
    packed = module.encode(x)
    assert packed.planes.shape[0] == steps + 1
    assert torch.equal(unpack_bits(packed), module(x).detach())


def test_identity_start_rounds_the_standardised_numbers() -> None:
    """With the statistics of all of x: the sign of x - mean, then the sign of what is left."""
    module, x = RecurrentBinarizer(8, hidden=20, identity=True), 3 * torch.randn(400, 8) + 5
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.momentum = None
    module(x)
    b = sign(x - x.mean(0))
    f = F.normalize((b - b.mean(0)) / b.std(0, correction=0), dim=1)
    left = x - f
    wanted = b + sign(left - left.mean(0)) / 2
    assert float((module.eval()(x) == wanted).float().mean()) > 0.999  # the running variance is divided by M - 1
    with pytest.raises(ValueError, match="identity needs"):
        RecurrentBinarizer(8, 9, 20, identity=True)
    with pytest.raises(ValueError, match="identity needs"):
        RecurrentBinarizer(8, hidden=15, identity=True)


def test_inverse_norms() -> None:
    codes = torch.randn(20, 65)
    packed = pack_codes(codes, 0.7, 2)
    wanted = 1 / unpack_bits(packed._replace(scale=None)).double().norm(dim=1)
    assert torch.allclose(inverse_norms(packed).double(), wanted, rtol=1e-6)
    assert inverse_norms(pack_codes(torch.zeros(2, 65), 1.0, 2)).tolist() == [0.0, 0.0]
    assert inverse_norms(pack_bits(torch.randn(0, 8))).shape == (0,)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_search_is_that_of_cosines(steps: int) -> None:
    q, d = torch.randn(5, 40), torch.randn(60, 40)
    queries, documents = pack_recurrent(q, steps), pack_recurrent(d, steps)
    a, b = (unpack_bits(t).double() for t in (queries, documents))
    cosine = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    values, index = symmetric_distance_topk(queries, documents, 7)
    assert torch.allclose(values.double(), cosine.sort(1, descending=True).values[:, :7], atol=1e-6)
    assert torch.allclose(cosine.gather(1, index), values.double(), atol=1e-6)
    again = symmetric_distance_topk(queries, documents, 7, inverse_norms(documents))
    assert torch.equal(again[0], values) and torch.equal(again[1], index)


def test_search_of_equal_documents_gives_the_first() -> None:
    documents = pack_recurrent(torch.ones(6, 16))
    _, index = symmetric_distance_topk(pack_recurrent(torch.ones(1, 16)), documents, 3)
    assert index.tolist() == [[0, 1, 2]]


def dense_loss(q: Tensor, d: Tensor, t: float, hard: int, ids: Tensor) -> Tensor:
    s = F.cosine_similarity(q[:, None], d[None], dim=-1)
    same = ids[:, None] == ids[None]
    total = torch.zeros((), dtype=s.dtype)
    for m in (s, s.T):
        for i in range(len(m)):
            negatives = m[i][~same[i]].sort(descending=True).values[:hard]
            total = total - F.log_softmax(torch.cat((m[i, i : i + 1], negatives)) / t, 0)[0]
    return total / (2 * len(q))


@pytest.mark.parametrize("hard", [1, 5, 30])
def test_loss_and_gradients(hard: int) -> None:
    q, d = (torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 7, 1, 8, 9])
    ours = recurrent_binarizer_loss(q, d, 0.1, hard=hard, ids=ids)
    theirs = dense_loss(q, d, 0.1, hard, ids)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    pairs = zip(torch.autograd.grad(ours, (q, d)), torch.autograd.grad(theirs, (q, d)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)
    no_ids = recurrent_binarizer_loss(q, d, 0.1, hard=hard)
    assert torch.allclose(no_ids, dense_loss(q, d, 0.1, hard, torch.arange(12)), rtol=1e-10)


def test_training_lowers_the_loss() -> None:
    x = F.normalize(torch.randn(48, 16), dim=1)
    near = F.normalize(x + 0.1 * torch.randn(48, 16), dim=1)
    module = RecurrentBinarizer(16, 24, 64)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = recurrent_binarizer_loss(module(x), module(near))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_one_row_has_no_negatives() -> None:
    assert float(recurrent_binarizer_loss(torch.randn(1, 4), torch.randn(1, 4))) == 0.0


def test_errors() -> None:
    codes = pack_recurrent(torch.randn(3, 8))
    with pytest.raises(ValueError, match="steps must be 0 to 3, got 4"):
        RecurrentBinarizer(4, steps=4)
    with pytest.raises(ValueError, match="steps must be 0 to 3"):
        pack_recurrent(torch.randn(2, 3), -1)
    with pytest.raises(ValueError, match=r"\[M, 4\], got \[2, 3\]"):
        RecurrentBinarizer(4)(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="eval mode"):
        RecurrentBinarizer(4).encode(torch.randn(2, 4))
    with pytest.raises(ValueError, match="count must be"):
        symmetric_distance_topk(codes, codes, 4)
    with pytest.raises(ValueError, match=r"must be floating \[3\]"):
        symmetric_distance_topk(codes, codes, 1, torch.ones(2))
    with pytest.raises(ValueError, match="one scale a row"):
        grouped = pack_codes(torch.randn(2, 128), torch.ones(2, 2), 2, group=64)
        symmetric_distance_topk(grouped, grouped, 1)
    with pytest.raises(TypeError, match="BitTensor"):
        inverse_norms(torch.randn(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        recurrent_binarizer_loss(torch.randn(2, 3), torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match="hard must be an integer >= 1, got 0"):
        recurrent_binarizer_loss(torch.randn(2, 3), torch.randn(2, 3), hard=0)
    with pytest.raises(ValueError, match=r"ids must be \[2\]"):
        recurrent_binarizer_loss(torch.randn(2, 3), torch.randn(2, 3), ids=torch.arange(3))
    with pytest.raises(ValueError, match="both be"):
        recurrent_binarizer_loss(torch.randn(2, 3), torch.randn(3, 3))
