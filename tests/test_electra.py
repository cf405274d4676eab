"""ELECTRA's two steps: corruption by a generator's samples, and the detection of what was replaced."""

from __future__ import annotations

import pytest
import torch

import fastloss
from fastloss import losses


def test_replace() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    masked = torch.tensor([[True, False, True, False], [False, False, False, True]])
    sampled = torch.tensor([5, 1, 2])  # the first is the original: real
    corrupted, replaced = losses.electra_replace(ids, masked, sampled)
    assert corrupted.tolist() == [[5, 6, 1, 8], [9, 5, 6, 2]]
    assert replaced.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    everywhere = torch.full_like(ids, 3).masked_scatter(masked, sampled)
    for a, b in zip(losses.electra_replace(ids, masked, everywhere), (corrupted, replaced), strict=True):
        assert torch.equal(a, b)
    assert ids[0, 2] == 7, "the input was written"
    same, none = losses.electra_replace(ids.int(), torch.zeros_like(masked), sampled[:0])
    assert torch.equal(same, ids.int()) and same.dtype == torch.int32 and not none.any()


def test_a_step() -> None:
    """From the generator's head to the discriminator's loss."""
    ids, masked = torch.randint(0, 50, (3, 8)), torch.rand(3, 8) < 0.3
    hidden, w = torch.randn(3, 8, 6), torch.randn(50, 6)
    drawn = fastloss.linear_sample(hidden[masked], w, seed=1)
    corrupted, replaced = losses.electra_replace(ids, masked, drawn.index)
    assert torch.equal(corrupted[~masked], ids[~masked]) and torch.equal(corrupted[masked], drawn.index)
    assert torch.equal(replaced.bool(), corrupted != ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_mask", [False, True])
def test_detection(dtype: torch.dtype, with_mask: bool) -> None:
    s = (torch.randn(4, 9) * 4).to(dtype)
    s[0, :3] = torch.tensor([120.0, -120.0, 0.0])
    y = (torch.rand(4, 9) < 0.3).float()
    mask = torch.rand(4, 9) < 0.8 if with_mask else None
    wide = s.double().clone().requires_grad_()
    p = torch.sigmoid(wide)
    terms = torch.where(y.bool(), -torch.nn.functional.logsigmoid(wide), -torch.nn.functional.logsigmoid(-wide))
    real = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    truth = 50 * terms[real].mean()
    leaf = s.clone().requires_grad_()
    if mask is not None:
        with torch.no_grad():
            leaf[~mask] = torch.nan  # padding is not read
    loss = losses.replaced_token_detection(leaf, y, mask)
    loss.backward()
    by_hand = torch.where(real, 50 * (p - y) / real.sum(), 0.0).detach()
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), truth, rtol=tight, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        leaf.grad.double(), by_hand, rtol=4 * eps, atol=1e-12 if dtype == torch.float64 else 1e-6
    )
    torch.testing.assert_close(losses.replaced_token_detection(leaf, y, mask, weight=1.0) * 50, loss)


def test_no_real_token() -> None:
    s = torch.randn(2, 3, requires_grad=True)
    loss = losses.replaced_token_detection(s, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not s.grad.any()
    assert losses.replaced_token_detection(torch.empty(0), torch.empty(0)) == 0


def test_errors() -> None:
    ids, mask = torch.arange(4), torch.tensor([True, False, True, False])
    for call, error, says in (
        (lambda: losses.electra_replace(ids.float(), mask, ids), TypeError, "integers"),
        (lambda: losses.electra_replace(ids, mask.long(), ids), ValueError, "torch.bool"),
        (lambda: losses.electra_replace(ids, mask, torch.tensor([1])), ValueError, r"\(2,\)"),
        (lambda: losses.electra_replace(ids, mask, torch.rand(4)), TypeError, "sampled"),
        (lambda: losses.replaced_token_detection(ids, ids), TypeError, "floating"),
        (lambda: losses.replaced_token_detection(torch.rand(3), ids), ValueError, r"\(3,\)"),
        (lambda: losses.replaced_token_detection(torch.rand(4), ids, ids), ValueError, "mask"),
    ):
        with pytest.raises(error, match=says):
            call()
