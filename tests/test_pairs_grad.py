"""Gradients of the pair functions: against finite differences, against the dense formula, compiled, transformed, in
autocast; what is saved for them; and that a second backward is bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fastloss
from dense_pairs import FEATURES, HARDNESS, cast, dense_stats, features, trained, values, weighted
from fastloss import Diagonal, SameId, edge_dot, pair_histogram, pair_map, pair_stats

M, N, D = 5, 6, 2
INF = float("inf")


def embeddings(m: int = M, n: int = N, d: int = D, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(m, d).to(dtype).requires_grad_(), torch.randn(n, d).to(dtype).requires_grad_()


def finite(x: Tensor) -> Tensor:
    return x.masked_fill(x.detach() == -INF, 0.0)


def everything(stats: fastloss.PairStats, rows_only: bool = False) -> tuple[Tensor, ...]:
    """All that has a gradient."""
    names = ["neg_lse", "pos_lse", "pos_sum", "lse", "nll"]
    names += ["neg_mean"] * stats.mean + ["second_neg_lse"] * (stats.second_scale is not None)
    found = [getattr(stats, name) for name in names]
    if not rows_only:
        found += [getattr(stats.columns, name) for name in ("neg_lse", "pos_lse", "pos_sum", "lse", "nll")]
    return tuple(finite(x) for x in found)


@pytest.mark.parametrize("feature", FEATURES)
def test_pair_stats_gradcheck_and_gradgradcheck(feature: str) -> None:
    arguments = features(M, N, D)[feature]
    names = trained(arguments)

    def function(q: Tensor, k: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        given = {**arguments, **dict(zip(names, leaves, strict=True))}
        return everything(pair_stats(q, k, **given))

    leaves = (*embeddings(), *(arguments[name] for name in names))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("function", ["softplus", "hinge", "squared_hinge", "sigmoid"])
def test_pair_map_gradcheck_and_gradgradcheck(function: str) -> None:
    leaves = (*embeddings(), *(torch.randn(count, dtype=torch.float64).requires_grad_() for count in (M, 1)))

    def sums(q: Tensor, k: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, ...]:
        return pair_map(
            q, k, function, neg_threshold=below, pos_threshold=above[0], scale=1.3, normalize=True,
            excluded=Diagonal(1),
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(sums, leaves)
    assert torch.autograd.gradgradcheck(sums, leaves)


def test_pair_histogram_gradcheck_and_gradgradcheck() -> None:
    leaves = (*embeddings(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True))

    def counts(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return pair_histogram(q, k, bins=7, low=-1.0, high=1.2, scale=scale, positive=Diagonal(0, 1))[:2]

    assert torch.autograd.gradcheck(counts, leaves)
    assert torch.autograd.gradgradcheck(counts, leaves)


def test_edge_dot_gradcheck_and_gradgradcheck() -> None:
    rows, columns = torch.tensor([4, 0, 0, 2, 4, 4]), torch.tensor([5, 1, 1, 0, 5, 3])
    assert torch.autograd.gradcheck(lambda q, k: edge_dot(q, k, rows, columns), embeddings())
    assert torch.autograd.gradgradcheck(lambda q, k: edge_dot(q, k, rows, columns), embeddings())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", (*FEATURES, *HARDNESS))
def test_equals_the_dense_formula(feature: str, dtype: torch.dtype) -> None:
    """Every statistic of rows and columns, and every gradient, on the default backend."""
    m, n, d = 37, 70, 16
    # where a similarity is compared with a number, rounding decides a tie: none is near one in these
    wide = {**features(m, n, d), **HARDNESS}[feature]
    q, k = (torch.randn(count, d).to(dtype).requires_grad_() for count in (m, n))
    ours_arguments = cast(wide, dtype if dtype == torch.float64 else torch.float32)
    if ours_arguments.get("guide") is not None:
        ours_arguments["guide"] = wide["guide"]
    reference = cast(ours_arguments, torch.float64)
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    right = dense_stats(q64, k64, **reference)
    ours = values(pair_stats(q, k, **ours_arguments), right)
    eps = 1e-12 if dtype == torch.float64 else 2e-5
    for name, value in right.items():
        torch.testing.assert_close(ours[name].double(), value.double(), rtol=eps, atol=eps, msg=f"{feature}: {name}")
    names = trained(wide)
    leaves = (q, k, *(ours_arguments[name] for name in names))
    truths = (q64, k64, *(reference[name] for name in names))
    mine = torch.autograd.grad(weighted(ours), leaves, allow_unused=True)
    theirs = torch.autograd.grad(weighted(right), truths, allow_unused=True)
    allowed = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, a, b in zip(("q", "k", *names), mine, theirs, strict=True):
        assert a is not None and a.dtype == (dtype if name in "qk" else leaves[2].dtype)
        b = torch.zeros_like(a, dtype=torch.float64) if b is None else b
        assert (a.double() - b).norm() <= allowed * b.norm() + 1e-12, f"{feature}: gradient of {name}"


# ---------------------------------------------------------------------------------------------- transforms


def clip(q: Tensor, k: Tensor) -> Tensor:
    stats = pair_stats(q, k, scale=3.0, normalize=True, positive=Diagonal(0))
    return (stats.nll.mean() + stats.columns.nll.mean()) / 2


def edges_of(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.arange(q.shape[0])
    return edge_dot(q, k, rows, rows.flip(0) % k.shape[0]).square().sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pair_stats": clip,
    "features": lambda q, k: sum(  # type: ignore[arg-type,return-value]
        finite(x).square().sum()
        for x in everything(
            pair_stats(
                q,
                k,
                positive=SameId(torch.arange(len(q)) // 2, torch.arange(len(k)) // 3),
                excluded=Diagonal(1),
                window=(-2.0, 2.0),
                margin=0.1,
                second_scale=2.0,
                mean=True,
                bias=0.3,
                scale=2.0,
            )
        )
    ),
    "self": lambda q, k: pair_stats(q, positive=Diagonal(2, -2), normalize=True, scale=2.0).nll.sum() + k.sum() * 0,
    "pair_map": lambda q, k: sum(x.sum() for x in pair_map(q, k, neg_threshold=0.1, normalize=True)[:2]),  # type: ignore[misc,return-value]
    "pair_histogram": lambda q, k: (pair_histogram(q, k, bins=11, low=-3.0, high=3.0).neg * torch.arange(11.0)).sum(),
    "edge_dot": edges_of,
}


def gradients(f: Callable[..., Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(q, k), (q, k))


@pytest.mark.parametrize("name", LOSSES)
def test_compile_fullgraph(name: str) -> None:
    """One graph forward and backward, with our op inside it."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend)
    q, k = embeddings(dtype=torch.float32)
    for a, b in zip(gradients(compiled, q, k), gradients(LOSSES[name], q, k), strict=True):
        torch.testing.assert_close(a, b)
    assert sum("fastloss" in target for target in found) >= 2, found


@pytest.mark.parametrize("name", LOSSES)
def test_compile_dynamic_shapes(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for m, n in ((5, 6), (7, 9), (12, 34)):
        q, k = embeddings(m, n, dtype=torch.float32)
        for a, b in zip(gradients(compiled, q, k), gradients(LOSSES[name], q, k), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "a graph for each shape"


def test_compile_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(clip, fullgraph=True, dynamic=True)
    q, k = embeddings(dtype=torch.float32)
    for a, b in zip(gradients(compiled, q, k), gradients(clip, q, k), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_vmap_and_jvp(name: str) -> None:
    f, k, qs = LOSSES[name], torch.randn(N, D, dtype=torch.float64), torch.randn(3, M, D, dtype=torch.float64)
    each = torch.stack([torch.autograd.grad(f(x, k), x)[0] for x in (t.clone().requires_grad_() for t in qs)])
    torch.testing.assert_close(grad(lambda x: f(x, k))(qs[0]), each[0])
    torch.testing.assert_close(vmap(grad(lambda x: f(x, k)))(qs), each)
    torch.testing.assert_close(vmap(lambda x: f(x, k))(qs), torch.stack([f(x, k) for x in qs]))
    tangent = torch.randn(M, D, dtype=torch.float64)
    _, directional = jvp(lambda x: f(x, k), (qs[0],), (tangent,))
    torch.testing.assert_close(directional, (each[0] * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    """As torch's matmul: the operands are rounded, the statistics float32, the gradients in the dtype of the leaves."""
    q, k = embeddings(40, 50, 16, torch.float32)
    with torch.autocast("cpu", dtype):
        ours = clip(q, k)
    assert ours.dtype == torch.float32
    rounded = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
    truth = clip(*rounded)
    torch.testing.assert_close(ours, truth)
    for a, b in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(truth, rounded), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float())


def test_autocast_joins_two_dtypes_and_leaves_float64() -> None:
    q, k = torch.randn(4, 3), torch.randn(4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(clip(q, k), clip(q.bfloat16(), k))
        assert clip(q.double(), k.double()).dtype == torch.float64


# ---------------------------------------------------------------------------------------------- memory and bits


def test_nothing_of_the_matrix_is_saved() -> None:
    """Of 512 x 512 pairs (1 MiB) the backward gets the embeddings, and a few numbers a row and a column."""
    count, d = 512, 16
    q, k = embeddings(count, count, d, torch.float32)
    for name, loss in LOSSES.items():
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss(q, k).backward()
        assert 0 < sum(saved.values()) < 2 * q.nbytes + 40 * 4 * 2 * count, (name, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_second_backward_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    q, k = embeddings(70, 90, 16, dtype)
    before = [x.detach().clone() for x in (q, k)]
    loss = LOSSES[name](q, k)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()  # what the caller does with a gradient is the caller's business
    again = torch.autograd.grad(loss, (q, k), retain_graph=True)
    fresh = gradients(LOSSES[name], q, k)
    for a, b, c in zip(kept, again, fresh, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(x, y) for x, y in zip((q, k), before, strict=True)), "the caller's tensors have changed"


@pytest.mark.parametrize("needed", ["q", "k", "scale", "column_scale"])
def test_only_what_is_needed_is_made(needed: str) -> None:
    """One leaf alone has the gradient that it has among all."""

    def run(leaves: tuple[str, ...]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        given: dict[str, Any] = {
            "q": torch.randn(9, 4), "k": torch.randn(11, 4), "scale": torch.rand(9) + 0.5,
            "column_scale": torch.rand(11) + 0.5,
        }  # fmt: skip
        for name in leaves:
            given[name].requires_grad_()
        loss = sum(finite(x).square().sum() for x in everything(pair_stats(**given)))
        return dict(zip(leaves, torch.autograd.grad(loss, [given[name] for name in leaves]), strict=True))

    torch.testing.assert_close(run((needed,))[needed], run(("q", "k", "scale", "column_scale"))[needed])


def test_where_both_sides_are_equal_the_slope_is_a_half() -> None:
    """Collapsed embeddings: one negative, as large as the positive. relu' and |x|' are 0 there, a sigmoid is not."""
    q, k = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    q.data[1] = 2.0
    stats = pair_stats(q, k)
    assert torch.equal(stats.neg_lse, stats.pos_lse)
    (dk,) = torch.autograd.grad(stats.nll.sum(), k)
    torch.testing.assert_close(dk, torch.tensor([[0.5], [-0.5]]).expand(2, 4))
