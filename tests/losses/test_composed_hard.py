"""Losses of few numbers on hard inputs: offsets, half precision, what is masked, and arguments that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastloss import losses

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_sparse_projection_of_shifted_scores(offset: float) -> None:
    """theta is a difference of sums: measured from the largest score it keeps its digits."""
    x = (torch.tensor([[0.5, 0.25, -3.0], [2.0, 2.0, 1.0]]) * 8 + offset).float()
    want = losses.sparse_projection(x.double(), 2)
    torch.testing.assert_close(losses.sparse_projection(x, 2), want.float())


def test_sparse_projection_of_what_has_none() -> None:
    assert losses.sparse_projection(torch.tensor([300.0, 298.0, 0.0], dtype=torch.bfloat16), 2).tolist() == [1, 0, 0]
    for bad in (NAN, INF, -INF):
        assert losses.sparse_projection(torch.full((2,), bad), 2).isnan().all()
    assert losses.soft_top_k(torch.tensor([300.0, 400.0], dtype=torch.float16), 2) == 125000
    with pytest.raises(TypeError, match="k must be an int, got float"):
        losses.sparse_projection(torch.ones(3), 2.0)  # type: ignore[arg-type]


def test_kl_dro_far_from_the_maximum() -> None:
    x = torch.rand(1000)
    for r in (1e-3, 0.3, 30.0, 1e6):
        exact = x.double().requires_grad_()
        want = r * (exact / r).logsumexp(0) - r * math.log(1000)
        ours = x.clone().requires_grad_()
        got = losses.kl_dro(ours, r=r)
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(got, ours)[0].double(), torch.autograd.grad(want, exact)[0]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_reductions_count_exactly() -> None:
    assert losses.hard_fraction(torch.arange(100.0), fraction=0.07) == 96
    with pytest.raises(ValueError, match=r"r must be > 0, got 0\.0"):
        losses.loss_reweighted(torch.rand(3), r=0.0)
    ones, one_bag = torch.ones(999, 1, dtype=torch.bfloat16), torch.zeros(999, dtype=torch.int64)
    ones[0] = 200  # sums to 1198
    assert losses.bag_mean(ones, one_bag, 1).item() == torch.tensor(1198 / 999, dtype=torch.bfloat16)
    assert losses.chunk_logp(torch.ones(1000, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64), 1) == 1000


def test_masked_rows_of_binary_losses_are_not_read() -> None:
    z = torch.randn(3, 4)
    z[1] = NAN
    z.requires_grad_()
    valid, target = torch.tensor([True, False, True]), torch.rand(3, 4)
    target[1] = 255
    losses.masked_bce(z, target, valid=valid).backward()
    assert z.grad is not None and z.grad.isfinite().all() and (z.grad[1] == 0).all()
    background = torch.tensor([NAN, -1.0], requires_grad=True)
    value = losses.background_triplet(background, torch.tensor([False, True]))
    (gradient,) = torch.autograd.grad(value, background)
    torch.testing.assert_close(value, 1 - 2 * torch.sigmoid(torch.tensor(-1.0)))
    assert gradient[0] == 0 and gradient.isfinite().all()


def test_binary_masks_are_not_broadcast() -> None:
    z, t = torch.randn(3, 4), torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"valid must be torch.bool \(3,\), got torch.bool \(3, 1\)"):
        losses.masked_bce(z, t, valid=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"trained must be torch.bool \(4,\), got torch.int64"):
        losses.masked_bce(z, t, trained=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"unlabelled must be torch\.bool"):
        losses.background_triplet(z[:, 0], torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be -1 or 1, got 0"):
        losses.ensemble_loss(torch.randn(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("side", ["input_mask", "target_mask"])
def test_edit_invariant_does_not_read_masked_tokens(side: str) -> None:
    """A NaN of a masked token must not reach others through the n-grams that hold both."""
    logp = torch.log_softmax(torch.randn(2, 5, 4), 1)
    poisoned, mask = logp.clone(), torch.ones(2, 5 if side == "input_mask" else 4, dtype=torch.bool)
    mask[:, -1] = False
    if side == "input_mask":
        poisoned[:, -1], kept = NAN, logp[:, :-1]
    else:
        poisoned[:, :, -1], kept = NAN, logp[:, :, :-1]
    poisoned.requires_grad_()
    kept = kept.clone().requires_grad_()
    value, want = losses.edit_invariant(poisoned, **{side: mask}), losses.edit_invariant(kept)
    torch.testing.assert_close(value, want)
    (gradient,) = torch.autograd.grad(value.sum(), poisoned)
    (truth,) = torch.autograd.grad(want.sum(), kept)
    torch.testing.assert_close(gradient[:, : kept.shape[1], : kept.shape[2]], truth)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match=side):
        losses.edit_invariant(logp, **{side: torch.ones(2, 6, dtype=torch.bool)})


def test_ids_of_listed_targets_are_checked() -> None:
    for bad in (-1, -100, 5):
        with pytest.raises(IndexError, match=f"target {bad} is out of bounds"):
            losses.target_logp(torch.randn(1, 3, 4), torch.randn(5, 4), torch.tensor([[0, bad]]))
    x, w = torch.randn(1, 30, 4) * 5, torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (losses.target_logp(x, w, torch.tensor([[0, 1, 2, 3, 4]])) <= 0).all()


def test_likelihood_arguments() -> None:
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3, 1\)"):
        losses.approximate_likelihood(torch.zeros(2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"tau must be > 0, got 0\.0"):
        losses.approximate_likelihood(torch.zeros(2), torch.zeros(2), tau=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_far_points_of_the_ball(dtype: torch.dtype) -> None:
    """x and -x at 0.99994 of the radius: twice the way to the middle, which artanh gives without loss."""
    x = torch.tensor([[3.0 if dtype == torch.bfloat16 else 3.162, 0.0]], dtype=dtype)
    want = 4 / math.sqrt(0.1) * torch.atanh(math.sqrt(0.1) * x[:, 0].double())
    got = losses.poincare_distance(x, -x)
    rtol = 1e-10 if dtype == torch.float64 else 1e-3  # 1 - c ||x||^2 is 2e-4: float32 keeps 3 digits of it
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
    with pytest.raises(ValueError, match=r"must be > 0, got -1\.0"):
        losses.exponential_map(x, c=-1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dependence_in_half_precision(dtype: torch.dtype) -> None:
    x: Tensor = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = losses.cauchy_schwarz_dependence(x, x[:, :1])
    want = losses.cauchy_schwarz_dependence(x.double(), x[:, :1].double())
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=0)


def test_hyperbolic_scores_under_autocast() -> None:
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 1, -100])
    planes, normals = losses.exponential_map(torch.randn(2, 3)), torch.randn(2, 3)
    want = losses.hyperbolic_cross_entropy(x, target, planes, normals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.hyperbolic_cross_entropy(x, target, planes, normals), want)
