"""Train a small transformer on scikit-learn's digits with its activations saved as 8 or 4 bits (Mesa).

    python examples/saved_activations.py            # half a minute on two CPU cores
    python examples/saved_activations.py --epochs 4

Each image is eight tokens, its rows. The forward is exact; what the backward reads is codes:

    saving = fastloss.quant.saved_activation(bits=8)
    with saving:
        loss = model(images, labels)
    loss.backward()
"""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastloss.quant import saved_activation

RUNS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "8 bits": {"bits": 8},
    "8 bits, Mesa's way": {"bits": 8, "group": 64, "stochastic": True, "ema": 0.9},
    "4 bits": {"bits": 4, "group": 64},
}


class Layer(nn.Module):
    """Attention and a perceptron, each on a normalised copy of the stream."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        parts = self.inward(self.before_attention(x)).chunk(3, -1)
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in parts)
        attention = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1)
        x = x + self.outward((attention @ v).transpose(1, 2).reshape(b, n, width))
        return x + self.perceptron(self.before_perceptron(x))


class Model(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) * 0.1)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(images) + self.position)).mean(1))


def train(options: dict[str, Any] | None, epochs: int, batch: int) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    learn, judge = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    saving = None if options is None else saved_activation(**options, min_numel=1024)
    start, last = time.perf_counter(), []
    for _ in range(epochs):
        last = []
        for rows in learn[torch.randperm(len(learn))].split(batch):
            with contextlib.nullcontext() if saving is None else saving:
                loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (model(images[judge]).argmax(1) == labels[judge]).float().mean().item()
    packed = "" if saving is None else f", packed {saving.exact_bytes / max(1, saving.packed_bytes):.2f} times smaller"
    print(f"accuracy {accuracy:.4f}, training loss {sum(last) / len(last):.4f}, {seconds:.1f} s{packed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    for name, options in RUNS.items():
        print(f"{name:20s} ", end="", flush=True)
        train(options, arguments.epochs, arguments.batch)


if __name__ == "__main__":
    main()
