"""The reuse order of a binary layer: distances, a minimum tree, and the identity, exactly."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from fastloss.quant import bgemm, pack_bits, pack_codes
from fastloss.quant.recipes import hamming_distances, reuse_order, reuse_products


def naive_distances(w: Tensor) -> Tensor:
    signs = w >= 0
    return (signs[:, None] != signs[None]).sum(-1)


@pytest.mark.parametrize(("n", "k"), [(1, 5), (2, 1), (9, 33), (40, 70), (30, 513)])
def test_tree_is_minimal_and_identity_exact(n: int, k: int) -> None:
    w, x = torch.randn(n, k), torch.randn(6, k)
    weight, packed = pack_bits(w), pack_bits(x)
    distances = naive_distances(w)
    assert torch.equal(hamming_distances(weight), distances)
    order = reuse_order(weight)
    # scipy takes 0 for no edge: every distance one more, and n - 1 less at the end
    least = int(minimum_spanning_tree((distances + 1).numpy()).sum()) - (n - 1)
    assert order.total == least
    assert sorted(order.order.tolist()) == list(range(n)) and int(order.parent[order.order[0]]) == -1
    place = {j: p for p, j in enumerate(order.order.tolist())}
    for j in order.order.tolist()[1:]:
        i = int(order.parent[j])
        assert place[i] < place[j] and int(order.distance[j]) == int(distances[i, j])
    expected = bgemm(packed, weight)
    made = reuse_products(packed, weight, order)
    assert made.dtype == torch.int32 and torch.equal(made, expected)  # type: ignore[arg-type]


def test_root_is_the_middle() -> None:
    """Rows that differ in one more column each: the tree is a path, half as deep from its middle."""
    w = torch.ones(9, 8).triu(0) * 2 - 1
    w = torch.where(torch.arange(8)[None] < torch.arange(9)[:, None], -1.0, 1.0)
    order = reuse_order(pack_bits(w[torch.randperm(9)]))
    assert order.total == 8 and order.depth == 4


def test_equal_rows_cost_nothing() -> None:
    w = torch.randn(1, 20).expand(7, 20)
    order = reuse_order(pack_bits(w, scale=torch.rand(7)))
    assert order.total == 0 and order.depth == 1
    x = pack_bits(torch.randn(2, 3, 20))
    assert torch.equal(reuse_products(x, pack_bits(w), order), bgemm(x, pack_bits(w)))  # type: ignore[arg-type]


def test_similar_rows_save_additions() -> None:
    base = torch.randn(1, 256).sign()
    w = torch.where(torch.rand(64, 256) < 0.05, -base, base)
    order = reuse_order(pack_bits(w))
    assert 256 + order.total < 64 * 256 / 5


def test_errors() -> None:
    weight = pack_bits(torch.randn(4, 9))
    with pytest.raises(ValueError, match="weight must be binary"):
        reuse_order(pack_codes(torch.randn(4, 9), 1.0, 2))
    with pytest.raises(ValueError, match="at least one row"):
        reuse_order(pack_bits(torch.randn(0, 9)))
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        reuse_order(pack_bits(torch.randn(2, 4, 9)))
    with pytest.raises(TypeError, match="BitTensor"):
        reuse_order(torch.randn(4, 9))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="that of 4 rows"):
        reuse_products(weight, weight, reuse_order(pack_bits(torch.randn(3, 9))))


def test_no_rows() -> None:
    weight, x = pack_bits(torch.randn(7, 64)), pack_bits(torch.randn(0, 64))
    assert reuse_products(x, weight, reuse_order(weight)).shape == (0, 7)
