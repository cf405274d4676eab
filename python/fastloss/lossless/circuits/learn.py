"""Maximum likelihood by expectation maximisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .circuit import Circuit, check_data
from .vtree import Vtree


def fit(
    data: Tensor, vtree: Vtree, values: int, hidden: int = 32, epochs: int = 30, batch: int = 128, smoothing: float = 0.02,
    seed: int = 0,
) -> Circuit:  # fmt: skip
    """A circuit for data like these, by mini-batch EM.

    The expected count of a parameter is theta d(sum log p)/d theta; a batch's counts, smoothed and normalised, replace the
    parameters with a weight that falls from 1 to 0.05 over the epochs.

    Args:
        data: integers [N, D] in 0..values-1.
        vtree: over D variables (`image_vtree`, `balanced_vtree`).
        values: how many values a variable has.
        hidden: mixtures a node; parameters grow with its square.
        epochs, batch: passes over the data, rows a step.
        smoothing: pseudo-count a parameter, so that no value has probability 0.
        seed: of the start and of the order of rows.

    Raises TypeError or ValueError as `Circuit` and `Circuit.log_likelihood` do, and ValueError for no rows.
    """
    circuit = Circuit(vtree, hidden, values, seed)
    check_data(circuit, data)
    if not len(data):
        raise ValueError("fit needs at least one row, got none")
    data = data.to(torch.int64)
    generator = torch.Generator().manual_seed(seed)
    steps = max(epochs * -(-len(data) // batch), 1)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(batch):
            rate = 1 - 0.95 * step / steps
            _em_step(circuit, data[rows], len(data) / len(rows), rate, smoothing)
            step += 1
    return circuit


def _em_step(circuit: Circuit, rows: Tensor, share: float, rate: float, smoothing: float) -> None:
    parameters = [p.requires_grad_() for p in circuit.parameters()]
    with torch.enable_grad():
        gradients = torch.autograd.grad(circuit.log_likelihood(rows).sum(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(False)
            counts = parameter * gradient * share + smoothing
            parameter.lerp_(counts / counts.sum(1, keepdim=True), rate)
