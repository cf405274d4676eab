"""Activations saved as codes: the codec, the hooks, and training with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloss import quant
from fastloss.quant import ActivationCodec, saved_activation
from saved_bytes import saved_by


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- The codec.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_codec_keeps_its_bounds(bits: int, stochastic: bool, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, 33).to(dtype)
    encoded = ActivationCodec(bits, 64, stochastic).encode(x)
    back = encoded.decode()
    assert back.shape == x.shape and back.dtype == dtype
    assert encoded.nbytes == math.ceil(x.numel() / 64) * (64 * bits // 8 + 8)
    flat = F.pad(x.double().reshape(-1), (0, -x.numel() % 64), value=float(x.reshape(-1)[-1])).reshape(-1, 64)
    span = (flat.amax(1) - flat.amin(1)).repeat_interleave(64)[: x.numel()]
    bound = (
        span / (2**bits - 1) / (1 if stochastic else 2) + x.double().abs().reshape(-1) * torch.finfo(dtype).eps + 1e-6
    )
    assert ((back.double() - x.double()).abs().reshape(-1) <= bound).all()


def test_constants_are_exact_and_empty_tensors_stay() -> None:
    for x in (torch.full((3, 100), 0.3), torch.zeros(7), torch.empty(0, 5), torch.tensor(2.5)):
        for ema in (None, 0.9):
            assert torch.equal(ActivationCodec(ema=ema).encode(x).decode(), x)


def test_running_ranges() -> None:
    """Means of the batches' ranges by channel group; what lies beyond is clamped, not wrapped around."""
    codec = ActivationCodec(8, 4, ema=0.75)
    first = torch.randn(6, 3, 8)
    codec.encode(first)
    parts = first.reshape(-1, 2, 4)
    low, high = parts.amin((0, 2)), parts.amax((0, 2))
    assert codec.low is not None and codec.high is not None
    torch.testing.assert_close((codec.low, codec.high), (low, high))
    second = first * 10
    back = codec.decode(codec.encode(second))
    low, high = low * 0.75 + low * 2.5, high * 0.75 + high * 2.5
    torch.testing.assert_close((codec.low, codec.high), (low, high))
    clamped = second.reshape(-1, 2, 4).clamp(low[:, None], high[:, None]).reshape(second.shape)
    assert (back - clamped).abs().max() <= (high - low).max() / 510 * 1.001 < (second - clamped).abs().max()
    with pytest.raises(ValueError, match="one place"):
        codec.encode(torch.randn(3, 12))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_a_nan_is_seen_and_does_not_stay(bad: float, first: bool) -> None:
    codec, x = ActivationCodec(8, 4, ema=0.9), torch.randn(5, 8)
    if not first:
        codec.encode(x)
    wrong = x.clone()
    wrong[2, 1] = bad
    back = codec.encode(wrong).decode()
    assert back[:, :4].isnan().all() and back[:, 4:].isfinite().all()
    assert codec.encode(x).decode().isfinite().all()
    back = ActivationCodec(8, 4).encode(wrong).decode()
    assert back[2, :4].isnan().all() and back.isfinite().sum() == x.numel() - 4


def test_options_are_checked() -> None:
    for words, options in (
        ("bits", {"bits": 2}),
        ("group", {"group": 3}),
        ("group", {"group": 0}),
        ("ema", {"ema": 1.0}),
    ):
        for make in (ActivationCodec, saved_activation):
            with pytest.raises(ValueError, match=words):
                make(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_numel"):
        saved_activation(min_numel=0)
    with pytest.raises(TypeError, match="floating"):
        ActivationCodec().encode(torch.ones(3, dtype=torch.int32))


# ---- The hooks.


def test_what_is_packed() -> None:
    w = nn.Parameter(torch.randn(64, 64))
    x = torch.randn(64, 64, requires_grad=True)
    made = x * 2
    hooks = saved_activation(min_numel=64 * 64)
    for left in (w, w.t(), w.bfloat16().t(), w[:, :].view(4096), x, torch.randn(64, 64), torch.ones(64, 64).long(), made[1:],
                 (made[0, 0] + 0).expand(64, 64)):  # fmt: skip
        assert hooks.pack(left) is left
    assert not isinstance(hooks.pack(made), Tensor)
    assert not isinstance(saved_activation(min_numel=64 * 64, constants=True).pack(torch.randn(64, 64)), Tensor)


@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.transpose(1, 2), lambda t: t.permute(2, 0, 1), lambda t: t[:, 3:, :], lambda t: t[..., ::2],
     lambda t: t[:, :1], lambda t: t.reshape(-1)],
)  # fmt: skip
def test_views_come_back_in_their_places(view: Callable[[Tensor], Tensor]) -> None:
    made = torch.randn(6, 20, 30, requires_grad=True) * 1
    hooks, t = saved_activation(min_numel=1), view(made)
    back = hooks.unpack(hooks.pack(t))
    assert back.shape == t.shape
    assert (back - t).abs().max() <= (t.max() - t.min()) / 510 * 1.001
    if t.is_contiguous() or t.numel() == made.numel():
        assert back.stride() == t.stride()


def test_a_tensor_is_packed_once() -> None:
    x = torch.randn(8, 40, 64, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    hooks = saved_activation(min_numel=1000)
    with hooks:
        h = x * 1
        y = sum(layer(h).sum() for layer in layers)
        assert hooks.exact_bytes == h.nbytes
        changed = h * 2
        changed.sin()
        changed.mul_(3)  # another version: other numbers, packed on their own
        z = changed.cos()
        assert hooks.exact_bytes == 3 * h.nbytes
    y.backward(retain_graph=True)
    (y + z.sum()).backward()
    assert x.grad is not None


def test_changed_memory_is_no_longer_the_same_tensor() -> None:
    """Codes belong to a tensor, not to an address that another tensor has later."""
    hooks = saved_activation(min_numel=1)
    x = torch.randn(4, 256, requires_grad=True)
    with hooks:
        kept = []
        for i in range(20):
            h = x * (i + 1)
            kept.append((i + 1, hooks.pack(h)))
            del h
    for factor, handle in kept:
        assert (hooks.unpack(handle) - x * factor).abs().max() < 0.03 * factor


class Block(nn.Module):
    """A pre-norm transformer layer, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, own: ActivationCodec | None = None) -> Tensor:
        b, n, width = x.shape

        def norm(layer: nn.LayerNorm, t: Tensor) -> Tensor:
            if own is None:
                return layer(t)
            return quant.layer_norm(t, layer.normalized_shape, layer.weight, layer.bias, layer.eps, own)

        q, k, v = (
            t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.inward(norm(self.first, x)).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        attention = torch.softmax(scores, -1) if own is None else quant.softmax(scores, -1, own)
        x = x + self.outward((attention @ v).transpose(1, 2).reshape(b, n, width))
        middle = self.up(norm(self.second, x))
        return x + self.down(F.gelu(middle) if own is None else quant.gelu(middle, codec=own))


class Model(nn.Module):
    """Two layers that say the next token."""

    def __init__(self, tokens: int = 16, width: int = 32, context: int = 32) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, width), nn.Parameter(torch.randn(context, width) * 0.5)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, tokens: Tensor, own: ActivationCodec | None = None) -> Tensor:
        x = self.embedding(tokens[:, :-1]) + self.position
        for block in self.blocks:
            x = block(x, own)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def batch(generator: torch.Generator) -> Tensor:
    """Sequences in which 5 t + 3 follows the token t, or by chance, one time in ten, any other."""
    tokens = torch.randint(16, (16, 33), generator=generator)
    chance = torch.rand(16, 33, generator=generator) < 0.1
    for i in range(1, 33):
        tokens[:, i] = torch.where(chance[:, i], tokens[:, i], (5 * tokens[:, i - 1] + 3) % 16)
    return tokens


def train(hooks: saved_activation | None, own: ActivationCodec | None = None, steps: int = 50) -> tuple[float, int]:
    """The mean loss of the last steps, and the bytes that a step saves."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    losses, size = [], 0
    for _ in range(steps):
        tokens = batch(generator)
        optimizer.zero_grad()
        loss, size = saved_by(hooks, lambda tokens=tokens: model(tokens, own))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, size


@pytest.fixture(scope="module")
def exact() -> tuple[float, int]:
    return train(None)


@pytest.mark.parametrize(
    "options, least",
    [
        ({"bits": 8, "group": 64}, 3.0),
        ({"bits": 8, "group": 32, "stochastic": True, "ema": 0.9}, 3.0),
        ({"bits": 4, "group": 64}, 5.0),
    ],
    ids=["u8", "mesa", "u4"],
)
def test_training_a_transformer(options: dict[str, Any], least: float, exact: tuple[float, int]) -> None:
    """Both come down from log 16 = 2.77; the loss is that of the exact run within noise, and far fewer bytes are kept."""
    loss, size = train(saved_activation(**options, min_numel=1024))
    assert exact[0] < 1.0
    assert abs(loss - exact[0]) < 0.05, (loss, exact[0])
    assert exact[1] / size >= least, (exact[1], size)


def test_training_with_functions_that_save_codes(exact: tuple[float, int]) -> None:
    loss, size = train(None, ActivationCodec(8, 64))
    assert abs(loss - exact[0]) < 0.05, (loss, exact[0])
    assert size < 0.85 * exact[1]


def test_gradients_inside_and_after_the_block_and_checkpoints() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    wanted = torch.autograd.grad(x.mul(1.0).sin().sum(), x)[0]
    with saved_activation(min_numel=1):
        y = x.mul(1.0).sin().sum()
        inside = torch.autograd.grad(y, x)[0]
        again = torch.utils.checkpoint.checkpoint(lambda t: t.mul(1.0).sin().sum(), x, use_reentrant=False)
    assert (inside - wanted).norm() / wanted.norm() < 0.02
    assert (torch.autograd.grad(again, x)[0] - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_group_larger_than_the_tensor_saves_no_padding(bits: int, ema: float | None) -> None:
    x = torch.randn(7, 3)
    encoded = ActivationCodec(bits, 1 << 40, ema=ema).encode(x)
    assert encoded.nbytes == 22 * bits // 8 + 8
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert float((encoded.decode() - x).abs().max()) <= step / 2 * (1 + 1e-5)
