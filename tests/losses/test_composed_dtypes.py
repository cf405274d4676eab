"""Losses of few numbers in float32 and bfloat16, against themselves in float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastloss import losses

PLANES = torch.tensor([[0.3, -0.2, 0.1, 0.4], [-0.5, 0.1, 0.0, 0.2]])
NORMALS = torch.tensor([[0.9, -1.1, 0.4, 0.2], [-0.3, 1.6, 0.8, -0.7]])
BAGS, STEPS = torch.tensor([0, 1, 1, 0, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
SIGNS, VALID = torch.tensor([1, -1, 1, 1, -1, -1]), torch.tensor([True, False, True, True, False, True])

#: Functions of x [6, 4] standard normal; what else they take is made in the dtype of x.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "aggregate_response": lambda x: losses.aggregate_response(lambda f, y: (f - y) ** 2, x[:, 0], x[:3, 1], BAGS),
    "approximate_likelihood": lambda x: losses.approximate_likelihood(-10 * x[0].abs(), -10 * x[1].abs()),
    "background_triplet": lambda x: losses.background_triplet(x[:, 0], VALID),
    "bag_mean": lambda x: losses.bag_mean(x, BAGS, 3),
    "cauchy_schwarz_dependence": lambda x: losses.cauchy_schwarz_dependence(x, x[:, :1], sigma_x=2.0, sigma_y=1.0),
    "chunk_logp": lambda x: losses.chunk_logp(x[:, 0], STEPS, 3),
    "class_correlation": losses.class_correlation,
    "confident_bilateral": lambda x: losses.confident_bilateral(3 * x, (5 * x).softmax(-1)),
    "edit_invariant": lambda x: losses.edit_invariant(x.reshape(1, 6, 4)),
    "hard_fraction": lambda x: losses.hard_fraction(x[:, 0]),
    "hyperbolic_cross_entropy": lambda x: losses.hyperbolic_cross_entropy(
        x, BAGS % 2, PLANES.to(x.dtype), NORMALS.to(x.dtype)
    ),
    "kl_dro": lambda x: losses.kl_dro(x[:, 0]),
    "loss_reweighted": lambda x: losses.loss_reweighted(x[:, 0]),
    "masked_bce": lambda x: losses.masked_bce(x, x.detach().sigmoid(), valid=VALID),
    "pairwise_confusion": lambda x: losses.pairwise_confusion(losses.exponential_map(x)),
    "profit_aware_bce": lambda x: losses.profit_aware_bce(x, x.detach().flip(0)),
    "soft_top_k": lambda x: losses.soft_top_k(x, 2),
    "sparse_projection": lambda x: losses.sparse_projection(x, 3),
    "tri_bce": lambda x: losses.tri_bce(x[:, 0], x[:, 1], x[:, 2], VALID),
}


@pytest.mark.parametrize(
    "dtype, relative", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", LOSSES)
def test_dtype(name: str, dtype: torch.dtype, relative: float) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    value, want = LOSSES[name](ours), LOSSES[name](exact)
    assert (value.double() - want).abs().max() <= relative * want.abs().max()
    (gradient,) = torch.autograd.grad(value.sum(), ours)
    (truth,) = torch.autograd.grad(want.sum(), exact)
    assert gradient.dtype == dtype and (gradient.double() - truth).abs().max() <= relative * truth.abs().max()
