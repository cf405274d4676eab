"""What region statistics and losses are, written down once more in plain torch and the textbook's words, for float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARED, BCE, ENTROPY, SHARP, PROBABILITIES = 1, 2, 4, 8, 16


def statistics(x: Tensor, t: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    """stats [10, R] of x [R, P] by the formulas of docs/design.md, element by element."""
    t = t.to(x.dtype)
    m = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().repeat_interleave(len(x) // len(mask), 0)
    x, t = x.where(m, torch.zeros_like(x)), t.where(m, torch.zeros_like(t))
    base = x if want & PROBABILITIES else torch.sigmoid(x)
    p = base
    if want & SHARP:
        p = torch.sigmoid(sharpness * (base - 0.5))
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none") if want & BCE else 0 * x
    # H(p) is the cross entropy of a prediction with itself
    entropy = F.binary_cross_entropy_with_logits(x, base, reduction="none") if want & ENTROPY else 0 * x
    square, label_square = ((p - t) ** 2, t * t) if want & SQUARED else (0 * x, 0 * x)
    terms = (0 * x + 1, t, p * t, p * (1 - t), (1 - p) * t, (1 - p) * (1 - t), square, label_square, bce, entropy)
    return torch.stack([torch.where(m, term, 0).sum(1) for term in terms])


LOSSES = {
    "dice": lambda i, s, y, q, n: 1 - (2 * i + 1) / (s + y + 1),
    "dice, plain": lambda i, s, y, q, n: 1 - 2 * i / (s + y + 1e-5),
    "dice, squared": lambda i, s, y, q, n: 1 - (2 * i + 1e-5) / (q + y + 1e-5),
    "iou": lambda i, s, y, q, n: 1 - (i + 1e-6) / (s + y - i + 1e-6),
    "tversky": lambda i, s, y, q, n: 1 - (i + 1) / (i + 0.2 * (s - i) + 0.7 * (y - i) + 1),
    "focal_tversky": lambda i, s, y, q, n: (1 - (i + 1) / (i + 0.3 * (s - i) + 0.7 * (y - i) + 1)) ** 0.75,
    "f_beta": lambda i, s, y, q, n: 1 - (1 + 4) * i / (4 * y + s + 1e-5),
    "g_mean": lambda i, s, y, q, n: 1 - i * (n - y - s + i) / (y * (n - y)),
    "balanced_accuracy": lambda i, s, y, q, n: 1 - ((n - y) * i + y * (n - y - s + i)) / (2 * y * (n - y)),
    "proportion_kl": lambda i, s, y, q, n: (s / n) * (s / n / 0.3).log() + (1 - s / n) * ((1 - s / n) / 0.7).log(),
}
"""The published formulas, of I = sum p t, S = sum p, Y = sum t, Q = sum p^2 and N."""

ARGUMENTS = {
    "dice, plain": {"form": "plain"},
    "dice, squared": {"form": "squared"},
    "tversky": {"alpha": 0.2, "beta": 0.7},
    "f_beta": {"beta": 2.0},
    "proportion_kl": {"prior": 0.3},
}
