"""Train on labels of which many are wrong: cross entropy against losses made for it, on scikit-learn's digits.

    python examples/noisy_labels.py            # seconds
    python examples/noisy_labels.py --noise 0.6

Each loss is one line of `fastloss.row_loss`; the clean test set says what was learned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastloss
from fastloss import losses

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, indices of the examples


def ways(examples: int) -> dict[str, Loss]:
    """The losses by name; ELR keeps a running average of the predictions for each example."""
    targets = losses.EarlyLearningTargets(examples, 10, beta=0.7)
    return {
        "cross entropy": lambda z, y, i: fastloss.cross_entropy(z, y),
        "generalised cross entropy (GCE)": lambda z, y, i: fastloss.row_loss(
            z, y, losses.generalized_cross_entropy, q=0.7
        ),
        "label-distributionally robust (LDR-KL)": lambda z, y, i: fastloss.row_loss(
            losses.softplus_normalize(z), y, losses.ldr_kl, lam=2.0, margin=5.0
        ),
        "early-learning regularisation (ELR)": lambda z, y, i: fastloss.row_loss(
            z, y, losses.early_learning, teacher=targets(z, i), lam=3.0
        ),
    }


def accuracy_of(loss: Loss, data: tuple[Tensor, ...], o: argparse.Namespace) -> tuple[float, float]:
    """(accuracy on the clean test set, share of the wrong labels that were learned by heart)."""
    x, noisy, wrong, x_test, y_test = data
    torch.manual_seed(o.seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=o.lr, momentum=0.9)
    for _ in range(o.epochs):
        for index in torch.randperm(len(x)).split(64):
            loss(model(x[index]), noisy[index], index).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        clean = (model(x_test).argmax(-1) == y_test).float().mean()
        heart = (model(x).argmax(-1) == noisy)[wrong].float().mean()
    return float(clean), float(heart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--noise", type=float, default=0.4, help="share of the training labels that are replaced at random"
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    digits = load_digits()
    torch.manual_seed(o.seed)
    order = torch.randperm(len(digits.data))
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order].long()
    x_test, y_test, x, y = x[:500], y[:500], x[500:], y[500:]
    wrong = torch.rand(len(y)) < o.noise
    noisy = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)
    print(f"{len(x)} digits, {int(wrong.sum())} of the labels wrong; 500 clean ones to test on")
    for name, loss in ways(len(x)).items():
        clean, heart = accuracy_of(loss, (x, noisy, wrong, x_test, y_test), o)
        print(f"{name:40s} test accuracy {clean:.3f}   wrong labels learned by heart {heart:.3f}")


if __name__ == "__main__":
    main()
