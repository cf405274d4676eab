"""Classify scikit-learn's digits with weights of 32, 4, 1.58 and 1 bits: accuracy, bytes and inference time of each.

    python examples/digits_low_bit.py            # well under a minute on two CPU cores
    python examples/digits_low_bit.py --quick    # seconds

The same network is trained from scratch with each kind of layer, and then packed:

    model = fastloss.quant.layers.convert(network, BinaryLinear, skip=ends)
    ... train ...
    packed = fastloss.quant.layers.pack_model(model)

Hidden layers have few bits; the first and the last layer stay in float32, as is usual: they are small and lose most.
Binary layers also see one bit an input, ternary layers int8, those of 4 bits 4. The time is that of the packed network, batch
normalisation and all. With the package's C++ extension products of bits run on its kernels; without it they are
composed of PyTorch operations and are slow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastloss
from fastloss.quant import layers


def dense(width: int) -> nn.Sequential:
    """Three hidden layers; hardtanh, since a binary layer learns where its inputs lie in [-1, 1]."""
    parts: list[nn.Module] = [nn.Flatten()]
    for size in (64, width, width):
        parts += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.Hardtanh()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def convolutional(width: int) -> nn.Sequential:
    """Three convolutions, the mean over the image, a linear layer."""
    parts: list[nn.Module] = []
    for channels, stride in ((1, 1), (width, 2), (width, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        parts += [conv, nn.BatchNorm2d(width), nn.Hardtanh()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def networks(width: int, channels: int) -> dict[str, Callable[[], nn.Module]]:
    """What is compared."""

    def hidden(layer: type[nn.Module], **options: Any) -> nn.Module:
        """The dense network with other hidden layers: they lie at 4 and 7."""
        return layers.convert(dense(width), layer, skip=("1", "10"), linear_options=options)

    return {
        "32 bits": lambda: dense(width),
        "4 bits": lambda: hidden(layers.QuantLinear, weight_bits=4, input_bits=4),
        "ternary": lambda: hidden(layers.BitLinear),
        "binary": lambda: hidden(layers.BinaryLinear),
        "32-bit convolutions": lambda: convolutional(channels),
        "binary convolutions": lambda: layers.binarize_model(convolutional(channels), scale="learned"),
    }


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model(x[:batch])  # the first batch sets the steps of inputs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            if len(rows) > 1:
                fastloss.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def milliseconds(model: nn.Module, images: Tensor, repeats: int) -> float:
    """The least time of one pass over the images."""
    model(images)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks and few epochs, unless they are named")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=512, help="of the hidden layers")
    parser.add_argument("--channels", type=int, default=32, help="of the convolutions")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(epochs=8, width=256, channels=16)
    o = parser.parse_args()
    digits = load_digits()
    torch.manual_seed(o.seed)
    order = torch.randperm(len(digits.images))
    x, y = (
        torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1,
        torch.tensor(digits.target)[order].long(),
    )
    x_test, y_test, x, y = x[:500], y[:500], x[500:], y[500:]
    thousand = x_test.repeat(2, 1, 1, 1)
    print(f"{len(x)} digits to train on, {len(x_test)} to test on, {torch.get_num_threads()} threads")
    print(
        f"{'network':20s} {'accuracy':>8s} {'packed':>7s} {'bytes':>10s} {'ms / 1000 images':>17s} {'trained in':>11s}"
    )
    for name, make in networks(o.width, o.channels).items():
        torch.manual_seed(o.seed)
        start = time.perf_counter()
        model = train(make(), x, y, o.epochs, o.batch)
        seconds = time.perf_counter() - start
        packed = layers.pack_model(model)
        with torch.no_grad():
            right = [float((m(x_test).argmax(1) == y_test).float().mean()) for m in (model, packed)]
        print(
            f"{name:20s} {right[0]:8.3f} {right[1]:7.3f} {layers.model_nbytes(packed):10,d} "
            f"{milliseconds(packed, thousand, 10):17.2f} {seconds:9.1f} s"
        )


if __name__ == "__main__":
    main()
