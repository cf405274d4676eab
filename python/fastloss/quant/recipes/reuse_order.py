"""The order in which the outputs of a binary layer are made from each other (MST-compression)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bgemm import bgemm, check_product
from ..bit_tensor import BitTensor, check_bits
from ..bits import unpack_bits


class ReuseOrder(NamedTuple):
    """A minimum spanning tree of the rows of a binary weight, by Hamming distance."""

    order: Tensor  # int64 [N]: every row after the one that it is made from
    parent: Tensor  # int64 [N]: which row that is, -1 for the first
    distance: Tensor  # int64 [N]: in how many columns both differ, 0 for the first

    @property
    def total(self) -> int:
        """The sum of the distances: additions of all rows but the first."""
        return int(self.distance.sum())

    @property
    def depth(self) -> int:
        """Edges from the first row to the furthest."""
        parent, depth = self.parent.tolist(), [0] * len(self.parent)
        for j in self.order.tolist()[1:]:
            depth[j] = depth[parent[j]] + 1
        return max(depth)


def hamming_distances(weight: BitTensor) -> Tensor:
    """In how many columns each pair of rows of a binary BitTensor differs: int64 [N, N], (K - <w_i, w_j>) / 2."""
    check_bits("weight", weight)
    if weight.weights != (2,) or weight.offset != -1:
        raise ValueError(f"weight must be binary (pack_bits), got weights {weight.weights} and offset {weight.offset}")
    if weight.planes.dim() != 3:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    plain = weight._replace(scale=None)
    products = bgemm(plain, plain)
    assert isinstance(products, Tensor)
    return (weight.columns - products.long()) // 2


def reuse_order(weight: BitTensor) -> ReuseOrder:
    """The minimum spanning tree of the rows of a binary weight [N, K], rooted where it is least deep.

    An output made from its parent's costs one addition for each column in which their weights differ (`reuse_products`),
    so the tree costs K + the sum of its distances in place of N K. Prim's tree from row 0, the lowest row first among equal
    distances; the root is the middle of its longest path, which makes it as shallow as this tree can be (the least depth
    among all minimum spanning trees, which the paper names, is not searched for). Its training loss was not found.

    Raises ValueError and TypeError unless weight is a binary BitTensor with a row.
    Source: "MST-compression: Compressing and Accelerating Binary Neural Networks with Minimum Spanning Tree".
    """
    distance = hamming_distances(weight).cpu()
    n = distance.shape[0]
    if not n:
        raise ValueError("weight must have at least one row, got [0, K]")
    edges = _prim(distance)
    neighbours: list[list[int]] = [[] for _ in range(n)]
    for a, b in edges:
        neighbours[a].append(b)
        neighbours[b].append(a)
    end = _walk(neighbours, 0)[0][-1]
    order, parents = _walk(neighbours, end)
    path = [order[-1]]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    order, parents = _walk(neighbours, path[len(path) // 2])
    parent = torch.tensor(parents)
    length = torch.where(parent >= 0, distance[torch.arange(n), parent.clamp(min=0)], 0)
    return ReuseOrder(torch.tensor(order), parent, length)


def _prim(distance: Tensor) -> list[tuple[int, int]]:
    """The edges of a minimum spanning tree of a full graph."""
    far = torch.iinfo(distance.dtype).max
    nearest, via = distance[0].clone(), torch.zeros(len(distance), dtype=torch.int64)
    outside = torch.ones(len(distance), dtype=torch.bool)
    outside[0] = False
    edges = []
    for _ in range(len(distance) - 1):
        j = int(torch.where(outside, nearest, far).argmin())
        edges.append((int(via[j]), j))
        outside[j] = False
        closer = distance[j] < nearest
        nearest, via = torch.where(closer, distance[j], nearest), torch.where(closer, j, via)
    return edges


def _walk(neighbours: list[list[int]], root: int) -> tuple[list[int], list[int]]:
    """(rows in the order of their depth, parent of each row) of a tree seen from `root`."""
    order, parent, seen = [root], [-1] * len(neighbours), {root}
    for i in order:
        for j in sorted(neighbours[i]):
            if j not in seen:
                seen.add(j)
                parent[j] = i
                order.append(j)
    return order, parent


def reuse_products(x: BitTensor, weight: BitTensor, order: ReuseOrder) -> Tensor:
    """x weightᵀ [M, N] int32 through the tree: equal to `bgemm(x, weight)` without scales, in K + `order.total` additions a
    row of x.

        y_j = y_i + 2 sum over the columns k with w_jk != w_ik of x_k w_jk,   i the parent of j

    Plain PyTorch, to see what the order saves (a product of bits is faster on hardware that has one).
    Raises ValueError and TypeError as `bgemm`.
    """
    check_product(x, weight)
    if order.parent.shape != (weight.rows,):
        raise ValueError(f"order must be that of {weight.rows} rows, got {len(order.parent)}")
    a, w = unpack_bits(x, torch.int32).reshape(x.rows, x.columns), unpack_bits(weight, torch.int32)
    y = torch.empty(x.rows, weight.rows, dtype=torch.int32, device=x.device)
    for j, i in zip(order.order.tolist(), order.parent[order.order].tolist(), strict=True):
        if i < 0:
            y[:, j] = (a * w[j]).sum(1)
        else:
            differs = (w[j] != w[i]).nonzero()[:, 0]
            y[:, j] = y[:, i] + 2 * (a[:, differs] * w[j, differs]).sum(1)
    return y.reshape(*x.shape[:-1], weight.rows)
