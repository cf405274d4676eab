"""Learn representations of scikit-learn's digits without labels, by NT-Xent (SimCLR) at a batch of 16,384 rows.

    python examples/contrastive_digits.py            # under two minutes on two CPU cores
    python examples/contrastive_digits.py --quick    # seconds

Two views of each image, shifted, turned, scaled and noisy; a row is to be found among all others by its other view:

    stats = fastloss.pair_stats(z, positive=Diagonal(n, -n), scale=1 / temperature, normalize=True)
    loss = stats.nll.mean()

The similarity matrix is never stored, and the encoder sees the batch in chunks (once to embed it, once more for its gradient),
so memory grows with the rows, not with their square. A few labels then judge the embeddings by nearest neighbours, beside the
raw pixels; and at a batch whose matrix fits, the dense loss is trained from the same seed.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastloss
from fastloss import Diagonal

Loss = Callable[[Tensor, float], Tensor]  # embeddings [2 n, D] of two views, temperature


def streamed(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent without the matrix."""
    n = len(z) // 2
    return fastloss.pair_stats(z, positive=Diagonal(n, -n), scale=1 / temperature, normalize=True).nll.mean()


def dense(z: Tensor, temperature: float) -> Tensor:
    """The same in plain PyTorch: cross entropy of the matrix of cosines, a row with itself left out."""
    n = len(z) // 2
    z = F.normalize(z, dim=1)
    logits = (z @ z.t() / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


LOSSES: dict[str, Loss] = {"streamed": streamed, "dense": dense}


def view(images: Tensor) -> Tensor:
    """Images [B, 8, 8], each turned, scaled, shifted and made noisy at random."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.7
    size, shift = 1 + (torch.rand(count) - 0.5) * 0.4, (torch.rand(count, 2) - 0.5) * 0.5
    matrix = torch.stack((angle.cos(), -angle.sin(), shift[:, 0], angle.sin(), angle.cos(), shift[:, 1]), 1)
    grid = F.affine_grid((matrix * size[:, None]).view(count, 2, 3), [count, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    return moved + 0.1 * torch.randn_like(moved)


def encoder(width: int) -> nn.Sequential:
    """Two convolutions and a layer; the last, the projection, is thrown away after training."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 64),
    )  # fmt: skip


def step(model: nn.Module, x: Tensor, loss_of: Loss, temperature: float, chunk: int) -> float:
    """The gradient of the loss of all rows, the encoder chunk by chunk: embed, differentiate the loss, embed again."""
    with torch.no_grad():
        z = torch.cat([model(part) for part in x.split(chunk)])
    loss = loss_of(z.requires_grad_(), temperature)
    (dz,) = torch.autograd.grad(loss, z)
    for part, slope in zip(x.split(chunk), dz.split(chunk), strict=True):
        model(part).backward(slope)
    return loss.item()


def train(
    images: Tensor, loss_of: Loss, pairs: int, steps: int, o: argparse.Namespace
) -> tuple[nn.Sequential, list[float]]:
    """The encoder and the loss of each step; images are drawn with replacement, so a batch may be as large as one likes."""
    torch.manual_seed(o.seed)
    model = encoder(o.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=o.lr)
    losses = []
    for _ in range(steps):
        drawn = images[torch.randint(len(images), (pairs,))]
        losses.append(step(model, torch.cat((view(drawn), view(drawn))), loss_of, o.temperature, o.chunk))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


@torch.no_grad()
def nearest_neighbours(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Accuracy of the label of the most similar known row, which row_topk finds without the matrix."""
    best = fastloss.row_topk(asked, known, 1, among="both", normalize=True).columns[:, 0]
    return float((labels[best] == truth).float().mean())


def loss_peak(name: str, rows: int, o: argparse.Namespace) -> str:
    """In words, the memory of the loss and its gradient alone, in a process of its own: in this one memory is used again."""
    if sys.platform != "linux":
        return "unknown memory"
    command = [
        sys.executable,
        __file__,
        "--peak-of",
        name,
        "--pairs",
        str(rows // 2),
        "--temperature",
        str(o.temperature),
    ]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536", "FASTLOSS_KEEP_BYTES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return f"{int(done.stdout) / 2**20:.0f} MiB"


def own_peak(loss_of: Loss, rows: int, temperature: float) -> int:
    """Peak resident bytes of one loss and its gradient, beyond what was there before."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    def call(z: Tensor) -> None:
        torch.autograd.grad(loss_of(z, temperature), z)

    call(torch.randn(64, 64, requires_grad=True))  # thread stacks, library state
    z = torch.randn(rows, 64, requires_grad=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    call(z)
    return max(0, status("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small batch and few steps, unless they are named")
    parser.add_argument("--pairs", type=int, default=8192, help="images a batch; each gives two rows")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compare-pairs", type=int, default=1024, help="images a batch of the comparison")
    parser.add_argument("--compare-steps", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each digit that judge the embeddings")
    parser.add_argument("--chunk", type=int, default=1024, help="rows that the encoder sees at a time")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", choices=LOSSES, help="only measure the memory of this loss")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(pairs=1024, steps=8, compare_pairs=256, compare_steps=8)
    o = parser.parse_args()
    if o.peak_of:
        print(own_peak(LOSSES[o.peak_of], 2 * o.pairs, o.temperature))
        return
    digits = load_digits()
    torch.manual_seed(o.seed)
    order = torch.randperm(len(digits.images))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order].long()
    x_test, y_test, x, y = x[:500], y[:500], x[500:], y[500:]
    some = torch.cat([(y == digit).nonzero()[: o.labels, 0] for digit in range(10)])

    def accuracy(embed: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return nearest_neighbours(embed(x[some]), y[some], embed(x_test), y_test)

    print(f"nearest neighbour among {len(some)} labelled digits, {len(x_test)} to test on")
    print(f"{'raw pixels':34s} accuracy {accuracy(lambda t: t.flatten(1)):.3f}")
    print(f"{'encoder, not trained':34s} accuracy {accuracy(encoder(o.width)[:-2]):.3f}")
    start = time.perf_counter()
    model, losses = train(x, streamed, o.pairs, o.steps, o)
    seconds = time.perf_counter() - start
    name = f"streamed NT-Xent, {2 * o.pairs:,} rows"
    print(
        f"{name:34s} accuracy {accuracy(model[:-2]):.3f}, loss {losses[0]:.3f} to {losses[-1]:.3f} in {o.steps} steps of "
        f"{seconds / o.steps:.2f} s; the loss takes {loss_peak('streamed', 2 * o.pairs, o)}, "
        f"its matrix would take {(2 * o.pairs) ** 2 * 4 / 2**20:.0f} MiB a copy"
    )
    for way, loss_of in LOSSES.items():
        model, losses = train(x, loss_of, o.compare_pairs, o.compare_steps, o)
        print(
            f"{f'{way} NT-Xent, {2 * o.compare_pairs:,} rows':34s} accuracy {accuracy(model[:-2]):.3f}, "
            f"loss {losses[0]:.5f} to {losses[-1]:.5f}; the loss takes {loss_peak(way, 2 * o.compare_pairs, o)}"
        )
    z = torch.randn(2 * o.compare_pairs, 64, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(z, o.temperature), z)[0] for f in (streamed, dense))
    print(f"gradients of one step differ by {float((ours - theirs).norm() / theirs.norm()):.1e} relative")


if __name__ == "__main__":
    main()
