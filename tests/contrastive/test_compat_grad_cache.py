"""fastloss.compat.grad_cache against the dense formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.grad_cache import SimpleContrastiveLoss
from peers import check_same, embeddings, largest_saved


@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hard_negatives(hard, reduction):
    x, y = embeddings(7, 5), embeddings(7 * (hard + 1), 5)
    target, weight = torch.arange(7) * (hard + 1), torch.rand(7, dtype=torch.float64)
    check_same(
        lambda: (weight * SimpleContrastiveLoss(hard)(x, y, reduction=reduction)).sum(),
        lambda: (weight * F.cross_entropy(x @ y.t(), target, reduction=reduction)).sum(),
        [x, y],
    )


def test_targets_of_the_users_own():
    x, y, target = embeddings(7, 5), embeddings(4, 5), torch.tensor([3, 0, 0, 1, 2, 3, 3])
    check_same(lambda: SimpleContrastiveLoss()(x, y, target), lambda: F.cross_entropy(x @ y.t(), target), [x, y])


def test_no_matrix_is_kept():
    x, y = embeddings(200, 8), embeddings(200, 8)
    assert largest_saved(lambda: SimpleContrastiveLoss()(x, y)) <= 200 * 9


def test_errors():
    x, y = torch.randn(4, 3), torch.randn(8, 3)
    for call, error, message in [
        (lambda: SimpleContrastiveLoss(2)(x, y), ValueError, "need 12 keys, got 8"),
        (lambda: SimpleContrastiveLoss()(x, y, torch.arange(3)), ValueError, r"shape \[4\]"),
        (lambda: SimpleContrastiveLoss()(x, y, torch.arange(4) + 5), IndexError, r"in \[0, 8\), got 5 to 8"),
        (lambda: SimpleContrastiveLoss()(x, y, reduction="mean_valid"), ValueError, "mean, sum, none"),
    ]:
        with pytest.raises(error, match=message):
            call()
