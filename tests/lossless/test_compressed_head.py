"""A compressed head under linear_cross_entropy: the dense call's numbers, without ever holding the dense head."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
import fastloss.functional as FL
from fastloss.lossless import CompressedTensor, compress, compress_model, head_chunks
from fastloss.lossless.head_chunks import rows_at_a_time
from tolerance import check_close, check_gradient

N, D, V = 24, 16, 203
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0, "logit_scale": -0.7},
    "class weights": {"weight": True, "label_smoothing": 0.2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "returns": ("lse", "accuracy", "entropy")},
    "entropy too": {"returns": "entropy", "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 0.1},
    "ignored rows left out": {"skip_ignored": True},
    "ignored rows left out of none": {"skip_ignored": True, "reduction": "none", "returns": ("lse",)},
    "probabilities": {"soft": True},
    "probabilities, class weights": {"soft": True, "weight": True, "label_smoothing": 0.1},
    "shifted": {"shift": True},
}
LIMITS = (None, 20000)


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(V, (N,), generator=g)
    y[3], y[4], y[5] = -100, 0, V - 1
    return {
        "x": torch.randn(N, D, generator=g).to(dtype), "w": (torch.randn(V, D, generator=g) / 4).to(dtype),
        "b": (torch.randn(V, generator=g) / 3).to(dtype), "y": y,
        "prob": torch.randn(N, V, generator=g).softmax(1).to(dtype), "weight": (torch.rand(V, generator=g) + 0.5).to(dtype),
    }  # fmt: skip


def called(kind: str, given: dict[str, Tensor], options: dict[str, Any], bias: bool, limit: int | None) -> list[Any]:
    """[loss, returned numbers, gradients]: "ours"; "torch", in the same dtype; "fp64"."""
    wide = {k: t.double() if kind == "fp64" and t.is_floating_point() else t for k, t in given.items()}
    x, b = wide["x"].clone().requires_grad_(), wide["b"].clone().requires_grad_() if bias else None
    options = dict(options)
    target = wide["prob"] if options.pop("soft", False) else wide["y"]
    if options.get("shift"):
        x = x.detach().reshape(4, -1, D).requires_grad_()
        target = target.reshape(4, -1)
    if options.get("weight"):
        options["weight"] = wide["weight"]
    if kind == "ours":
        out = FL.linear_cross_entropy(x, compress(given["w"]), target, linear_bias=b, max_extra_bytes=limit, **options)
    else:
        options.pop("skip_ignored", None)
        z = F.linear(x, wide["w"], b)
        out = FL.cross_entropy(z.movedim(-1, 1), target, **options)
    loss, numbers = out if isinstance(out, tuple) else (out, {})
    total = loss.double().sum() + sum(t.double().sum() for t in numbers.values() if t.requires_grad)
    return [loss, numbers, torch.autograd.grad(total, [x] if b is None else [x, b])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_dense_head(variant: str, dtype: torch.dtype) -> None:
    given = operands(dtype)
    for bias, limit in itertools.product((False, True), LIMITS):
        ours, torchs, truth = (
            called(kind, given, VARIANTS[variant], bias, limit) for kind in ("ours", "torch", "fp64")
        )
        assert ours[0].dtype == torchs[0].dtype and ours[0].shape == torchs[0].shape
        check_close(ours[0], torchs[0], truth[0], dtype, k=16)
        for name, number in ours[1].items():
            check_close(
                number, torchs[1][name], truth[1][name], torch.float32 if dtype == torch.float32 else dtype, k=16
            )
        for a, b, r in zip(ours[2], torchs[2], truth[2], strict=True):
            check_gradient(*(t.reshape(-1, t.shape[-1]) for t in (a, b, r)), dtype, k=8)


@pytest.mark.parametrize("codec", ["p7", "raw"])
@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_every_layout_and_codec(codec: str, layout: str) -> None:
    if layout == "tiles" and codec == "raw":
        codec = "auto"
    w = (torch.randn(48, 128) / 16).bfloat16()
    x, y = torch.randn(6, 128).bfloat16(), torch.randint(48, (6,))
    packed = compress(w, codec, layout=layout)
    ours = [FL.linear_cross_entropy(x, packed, y, max_extra_bytes=limit) for limit in (None, 1)]
    dense = F.cross_entropy(F.linear(x, w).float(), y)
    for loss in ours:
        torch.testing.assert_close(loss.float(), dense, rtol=1e-2, atol=1e-2)


def test_hard_rows() -> None:
    """Offsets of 1e4, infinities, NaN, one class only: what the dense head says."""
    w = torch.randn(40, 4)
    packed, y = compress(w), torch.tensor([0, 1, 39, 7, 5])
    x = torch.randn(5, 4)
    bias = torch.zeros(40)
    for fill in (
        {},
        {3: 1e4},
        {3: -torch.inf},
        {7: -torch.inf},
        {3: torch.nan},
        {k: -torch.inf for k in range(40) if k != 7},
    ):
        b = bias.clone()
        for k, value in fill.items():
            b[k] = value
        given = x.clone().requires_grad_()
        ours = FL.linear_cross_entropy(given, packed, y, linear_bias=b, reduction="none", max_extra_bytes=1)
        dense = FL.cross_entropy(F.linear(x, w, b), y, reduction="none")
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5, equal_nan=True)
        rows = dense.isfinite()
        if rows.any() and fill.get(3) is not torch.nan:
            (got,) = torch.autograd.grad(ours[rows].sum(), given)
            assert got[rows].isfinite().all()
    one = compress(torch.randn(1, 4))
    assert float(FL.linear_cross_entropy(x, one, torch.zeros(5, dtype=torch.int64))) == 0.0


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest floating tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_dense_head_never_exists() -> None:
    vocab, columns, n, limit = 2048, 16, 4, 20000
    head = compress(torch.randn(vocab, columns))
    x, y = torch.randn(n, columns), torch.randint(vocab, (n,))
    chunk = rows_at_a_time(n, vocab, columns, 4, limit)
    assert 16 <= chunk and chunk * (columns + n) * 4 <= limit and chunk < vocab // 8
    tail = (x, head.blob, head.plan, head.dtype, None, y, None, None, -100, 0, 1.0, 0.0)
    with _Largest() as largest:  # sees what the ops do, as they are called by their functions
        stats, argmax = head_chunks._row_stats(*tail, limit)
        head_chunks._row_stats_backward(torch.ones(7, n), stats, argmax, *tail, 1, limit)
    assert largest.numbers == chunk * columns
    with _Largest() as largest:
        head.decompress(verify="off")
    assert largest.numbers == vocab * columns
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
        FL.linear_cross_entropy(x.requires_grad_(), head, y, max_extra_bytes=limit)
    assert max(saved) == head.nbytes


def test_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, columns = 256, 16
    head = compress(torch.randn(vocab, columns))
    alive: list[weakref.ref[Tensor]] = []
    real = head_chunks.scores

    def scores(z: Tensor, scale: float, softcap: float) -> Tensor:
        assert not any(ref() is not None for ref in alive), "the last chunk is still there when the next one is made"
        made = real(z, scale, softcap)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(head_chunks, "scores", scores)
    x, y = torch.randn(4, columns, requires_grad=True), torch.randint(vocab, (4,))
    FL.linear_cross_entropy(x, head, y, max_extra_bytes=5000).backward()
    assert len(alive) > 10


def test_refuses_what_a_frozen_head_cannot_do() -> None:
    head, x, y = compress(torch.randn(V, D)), torch.randn(N, D, requires_grad=True), torch.zeros(N, dtype=torch.int64)
    call = FL.linear_cross_entropy
    for message, error, arguments, options in (
        ("grad_weight", ValueError, (x, head, y), {"grad_weight": torch.zeros(V, D)}),
        ("get no gradient", ValueError, (x, head, torch.rand(N, V, requires_grad=True)), {}),
        (r"is \[V, D\], got shape \[2, 3, 16\]", ValueError, (x, compress(torch.randn(2, 3, D)), y), {}),
        ("ignore_index and shift", ValueError, (x, head, torch.rand(N, V)), {"ignore_index": 1}),
        ("target must be class ids", ValueError, (x, head, y[:3]), {}),
        (r"input must be \[\.\.\., 16\]", RuntimeError, (x[:, :5], head, y), {}),
        ("linear_bias must be", RuntimeError, (x, head, y), {"linear_bias": torch.zeros(3)}),
        ("like the compressed weight", TypeError, (x.half(), head, y), {}),
        ("reduction must be", ValueError, (x, head, y), {"reduction": "median"}),
        ("target 203 at row 0 is out of bounds", IndexError, (x, head, y + V), {}),
        ("max_extra_bytes must be > 0", ValueError, (x, head, y), {"max_extra_bytes": 0}),
        ("linear_weight must be a tensor, got list", TypeError, (x, [1], y), {}),
    ):
        with pytest.raises(error, match=message):
            call(*arguments, **options)
    (once,) = torch.autograd.grad(call(x, head, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_autocast_and_compile() -> None:
    w, x, y = torch.randn(V, D) / 4, torch.randn(N, D), torch.randint(V, (N,))
    head = compress(w)
    with torch.autocast("cpu", torch.bfloat16):
        ours, dense = (FL.linear_cross_entropy(x, t, y) for t in (head, w))
    assert ours.dtype == dense.dtype
    torch.testing.assert_close(ours, dense, rtol=1e-2, atol=1e-2)
    compiled = torch.compile(
        lambda x, y: FL.linear_cross_entropy(x, head, y), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (5, 9):
        a, b = x[:n].clone().requires_grad_(), x[:n].clone().requires_grad_()
        compiled(a, y[:n]).backward()
        FL.linear_cross_entropy(b, head, y[:n]).backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_opcheck() -> None:
    w, x, y = torch.randn(64, 128) / 16, torch.randn(5, 128), torch.randint(64, (5,))
    p, o = compress(w), torch.ops.fastloss
    tail = (x, p.blob, p.plan, p.dtype, w[:, 0].clone(), y, None, None, -100, 16 | 4, 1.0, 0.0)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(o.compressed_row_stats.default, (*tail, 0), test_utils=tests)
    stats, argmax = o.compressed_row_stats(*tail, 0)
    backward = (torch.zeros(7, 5), stats, argmax, *tail, 1 | 4, 0)
    torch.library.opcheck(o.compressed_row_stats_backward.default, backward, test_utils=tests)


def test_the_loss_module_takes_a_compressed_head() -> None:
    torch.manual_seed(0)
    loss = fastloss.nn.LinearCrossEntropyLoss(D, V, bias=True)
    x, y = torch.randn(N, D), torch.randint(V, (N,))
    dense = loss(x, y)
    assert compress_model(loss, min_bytes=0).compressed
    assert isinstance(loss.linear.compressed_weight, CompressedTensor)  # type: ignore[union-attr]
    torch.testing.assert_close(loss(x, y), dense)
    wide = fastloss.nn.LinearCrossEntropyLoss(D, 7, out_features=(16,))
    targets = torch.randint(7, (N, 16))
    dense = wide(x, targets)
    assert compress_model(wide, min_bytes=0).compressed
    torch.testing.assert_close(wide(x, targets), dense)
