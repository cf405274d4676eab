"""The pair kernels on a GPU: every op against float64, the copy engine, no host sync, graphs, reruns, a large batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.contract import PairClasses, PairFunction, PairWant
from fastloss.pairs.pairing import Pairing
from gpu_pair_checks import check_edges, check_large, check_map, check_stats, check_topk, on
from test_gpu import DTYPES, available
from triton_pair_problem import EVERYTHING, close, close_gradients, features, gradient_truth, operands, statistics_truth

pytestmark = pytest.mark.gpu
OPS = torch.ops.fastloss
FEATURES = (
    "nothing", "diagonal", "two diagonals", "queue", "far diagonals", "ids", "ids and all else", "excluded ids", "bits",
    "excluded bits", "guide",
)  # fmt: skip
#: (M, N, D): less than a tile, no multiple of one, several of them, and a D that the copy engine reads.
SHAPES = ((1, 1, 1), (5, 77, 33), (300, 70, 48), (129, 515, 1152))
EDGES = ("cuda", "triton")


# --------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("want", [0, EVERYTHING])
@pytest.mark.parametrize("kind", FEATURES)
def test_stats_features(kind: str, want: int) -> None:
    available("triton")
    m, n = 150, 333
    p = on(operands(m, n, 64, torch.bfloat16, **features(kind, m, n)))
    extra = dict(boost=torch.rand(m, device="cuda") * 2 - 0.5, margin=torch.rand(m, device="cuda")) if want else {}
    check_stats(p, want, **extra)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diagonal", "ids and all else", "guide"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats_shapes(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    available("triton")
    m, n, d = shape
    check_stats(on(operands(m, n, d, dtype, **features(kind, m, n))), int(PairWant.COLUMNS))


@pytest.mark.parametrize("forward, backward", [("triton", "reference"), ("reference", "triton")])
def test_stats_of_any_forward_with_any_backward(forward: str, backward: str) -> None:
    available("triton")
    p = on(operands(150, 333, 64, **features("ids and all else", 150, 333)))
    check_stats(p, forward=forward, backward=backward)


@pytest.mark.parametrize("kind", ["diagonal", "ids"])
def test_stats_of_hard_values(kind: str) -> None:
    """All scores below the underflow of exp; one that towers above all."""
    available("triton")
    p = on(operands(150, 333, 64, **features(kind, 150, 333)))
    check_stats(p._replace(q=p.q.abs(), k=-p.k.abs() - 0.3, row_scale=p.row_scale * 100))
    k = p.k.clone()
    k[5] = 100 * p.q[3]
    check_stats(p._replace(k=k))


@pytest.mark.parametrize("kind", ["diagonal", "ids"])
def test_what_is_not_valid_may_hold_anything(kind: str) -> None:
    """Half a queue is NaN, also beyond the last tile that is full."""
    available("triton")
    m, n = 150, 333
    p = on(operands(m, n, 64, torch.bfloat16, **features(kind, m, n)))
    row_valid, column_valid = (torch.ones(size, dtype=torch.uint8, device="cuda") for size in (m, n))
    row_valid[3], column_valid[170:] = 0, 0
    p = p._replace(row_valid=row_valid, column_valid=column_valid)
    grads = torch.randn(9, m, device="cuda"), torch.randn(7, n, device="cuda")

    def run(p: Pairing) -> list[Tensor]:
        with fastloss.use_backend("triton"):
            tables = OPS.pair_stats(*p, None, None, EVERYTHING, 2.0, 0)
            return [*tables, *OPS.pair_stats_backward(*grads, *tables, *p, None, None, EVERYTHING, 2.0, 0, 7)]

    clean = run(p)
    p.q[3], p.k[170:], p.row_scale[3] = torch.nan, torch.nan, torch.nan
    assert all(torch.equal(a, b) for a, b in zip(run(p), clean, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["two diagonals", "ids and all else"])
def test_map(kind: str, dtype: torch.dtype) -> None:
    available("triton")
    for (m, n, d), function in zip(SHAPES, PairFunction, strict=True):
        check_map(on(operands(m, n, d, dtype, **features(kind, m, n))), function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", tuple(PairClasses))
def test_topk(classes: PairClasses, dtype: torch.dtype) -> None:
    available("triton")
    for m, n, d in SHAPES:
        for kind, count in (("nothing", 1), ("two diagonals", 10), ("ids", 64)):
            check_topk(on(operands(m, n, d, dtype, **features(kind, m, n))), count, int(classes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", EDGES)
def test_edges(backend: str, dtype: torch.dtype) -> None:
    available(backend)
    for (m, n, d), edges in zip(SHAPES, (1, 40, 5000, 20011), strict=True):
        check_edges(backend, m, n, d, edges, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["diagonal", "ids"])
def test_copy_engine(kind: str, dtype: torch.dtype) -> None:
    """With descriptors and without, forward and backward; rows that are off 16 bytes cannot take them."""
    available("triton")
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs the copy engine of sm_90")
    from fastloss.triton_kernels import pair_stats as kernels

    p = on(operands(300, 515, 192, dtype, **features(kind, 300, 515)))
    args = None, None, int(PairWant.COLUMNS), 1.0
    truth = statistics_truth(p, *args)
    grads = torch.randn(9, 300, device="cuda"), torch.randn(7, 515, device="cuda")
    for tma in (True, False):
        rows, columns = kernels.pair_stats(p, *args, tma=tma)
        close(rows, truth[0], 5e-5), close(columns, truth[1], 5e-5)
        made = kernels.pair_stats_backward(*grads, rows, columns, p, *args, 15, tma=tma)
        close_gradients(made, gradient_truth(grads, p, *args), dtype)
    q, k = (torch.nn.functional.pad(x, (1, 2))[:, 1:193] for x in (p.q, p.k))
    check_stats(p._replace(q=q, k=k))


# --------------------------------------------------------------------------------------------- streams and memory


def leaves(b: int = 512, d: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k and a scale of their own."""
    q, k = (torch.nn.functional.normalize(torch.randn(b, d, device="cuda"), dim=1).to(dtype) for _ in range(2))
    return [q.requires_grad_(), k.requires_grad_(), torch.tensor(20.0, device="cuda", requires_grad=True)]


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def clip(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return gradients(fastloss.contrastive.clip_loss(q, k, scale, normalize=True), q, k, scale)


def clip_of_a_number(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return gradients(fastloss.contrastive.clip_loss(q, k, 20.0), q, k)


def siglip(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    sums = fastloss.pair_map(q, k, scale=scale, neg_threshold=10.0, pos_threshold=10.0)
    return gradients((sums.neg + sums.pos).mean(), q, k, scale)


def hardest(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """row_topk, and edge_dot along what it found."""
    best = fastloss.row_topk(q, k, 4, scale=scale)
    rows = torch.arange(len(q), device=q.device).repeat_interleave(4, output_size=4 * len(q))
    return gradients(fastloss.edge_dot(q, k, rows, best.columns.flatten()).exp().mean(), q, k)


STEPS: tuple[Callable[..., tuple[Tensor, ...]], ...] = (clip, clip_of_a_number, siglip, hardest)


def check_step(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()


@pytest.mark.parametrize("step", STEPS)
def test_no_host_sync(step: Callable[..., tuple[Tensor, ...]]) -> None:
    """Forward and backward never wait for the device."""
    available("triton")
    inputs = leaves()
    with fastloss.use_backend("reference"):
        want = step(*inputs)
    step(*inputs)  # what is compiled or allocated once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_step(got, want)


@pytest.mark.parametrize("step", STEPS)
def test_cuda_graph(step: Callable[..., tuple[Tensor, ...]]) -> None:
    """Capture forward and backward once, replay on new embeddings."""
    available("triton")
    inputs, side = leaves(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    with torch.no_grad():
        for old, new in zip(inputs, leaves(), strict=True):
            old.copy_(new)
    graph.replay()
    check_step(captured, step(*inputs))


@pytest.mark.parametrize("step", STEPS)
def test_two_runs_are_bit_equal(step: Callable[..., tuple[Tensor, ...]]) -> None:
    """Enough row blocks and splits that an order of summation could differ."""
    available("triton")
    inputs = leaves(3000, 72)
    for first, second in zip(step(*inputs), step(*inputs), strict=True):
        assert torch.equal(first, second)


def test_a_batch_of_32768() -> None:
    """Right at the start, in the middle and at the end; both passes in half the bfloat16 matrix's memory."""
    available("triton")
    q, k, _ = leaves(32768, 768)
    fastloss.contrastive.clip_loss(*leaves(256, 768)).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(fastloss.contrastive.clip_loss(q, k, 20.0), (q, k))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
    check_large(q.detach(), k.detach(), torch.tensor([0, 1, 16383, 16384, 32766, 32767], device="cuda"))
