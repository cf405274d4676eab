"""A smooth, structured-decomposable probabilistic circuit over discrete variables."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .vtree import Vtree, leaves


class Circuit:
    """p(x) over D variables of `values` values each, as `hidden` mixtures at every node of a vtree.

    A leaf i has K distributions theta_i [K, V]. An inner node v multiplies its children unit by unit and mixes:
    v = W_v (left * right), W_v [K, K] with rows that sum to 1 ([1, K] at the root). All in float64.

    Args:
        vtree: the variables 0..D-1, each once.
        hidden: K.
        values: V.
        seed: of the random start.

    Raises ValueError where the vtree does not hold 0..D-1 once each, or for hidden or values below 1.
    """

    def __init__(self, vtree: Vtree, hidden: int, values: int, seed: int = 0) -> None:
        order = leaves(vtree)
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"a vtree holds each of the variables 0..{len(order) - 1} once, got {order}")
        if hidden < 1 or values < 1:
            raise ValueError(f"hidden and values must be at least 1, got {hidden} and {values}")
        generator = torch.Generator().manual_seed(seed)

        def distributions(rows: int, columns: int) -> Tensor:
            raw = torch.rand(rows, columns, dtype=torch.float64, generator=generator) + 0.1
            return raw / raw.sum(1, keepdim=True)

        self.vtree, self.hidden, self.values = vtree, hidden, values
        self.variables = len(order)
        self.leaf = [distributions(hidden, values) for _ in order]
        #: By the node's place in a walk that meets parents first.
        self.weight = [distributions(1 if i == 0 else hidden, hidden) for i in range(len(order) - 1)]
        if len(order) == 1:
            self.weight = [distributions(1, hidden)]

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor of distributions, rows summing to 1."""
        yield from self.leaf
        yield from self.weight

    def log_likelihood(self, data: Tensor) -> Tensor:
        """log p(x) of each row of `data` (integers [N, D] in 0..values-1): [N], float64, in nats; differentiable.

        Raises TypeError or ValueError for other data.
        """
        check_data(self, data)
        place = iter(range(len(self.weight)))

        def up(node: Vtree) -> tuple[Tensor, Tensor]:
            if isinstance(node, int):
                return self.leaf[node].t()[data[:, node]], torch.zeros(len(data), dtype=torch.float64)
            weight = self.weight[next(place)]
            (left, a), (right, b) = up(node[0]), up(node[1])
            product = left * right
            top = product.amax(1, keepdim=True).clamp(min=1e-300)  # kept in range: D factors below 1 would underflow
            return (product / top) @ weight.t(), a + b + top[:, 0].log()

        if isinstance(self.vtree, int):
            return (self.leaf[self.vtree].t()[data[:, self.vtree]] @ self.weight[0].t())[:, 0].log()
        root, scale = up(self.vtree)
        return root[:, 0].log() + scale


def check_data(circuit: Circuit, data: Tensor) -> None:
    """Raise TypeError or ValueError unless `data` is integers [N, D] that the circuit can hold."""
    if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
        raise TypeError(f"data must be integers, got {data.dtype}")
    if data.dim() != 2 or data.shape[1] != circuit.variables:
        raise ValueError(f"data must be [N, {circuit.variables}], got {list(data.shape)}")
    if data.numel() and (int(data.min()) < 0 or int(data.max()) >= circuit.values):
        raise ValueError(f"data must lie in 0..{circuit.values - 1}, got {int(data.min())}..{int(data.max())}")
