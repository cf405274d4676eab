"""`SphericalLinear` against fused softmax cross entropy for growing numbers of classes: `python bench/spherical.py`.

A training step is forward, backward and the update of the weight by SGD. "stabilize" is what every hundredth step does
besides, where all singular values are in range; one that is not costs a pass over V. Prints a table, writes a JSON file into
bench/results/ and, with --plot, docs/img/spherical.svg. Same features, batch and float32 weight on both sides.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastloss
from common import DEVICE, RESULTS, cpu_model, machine
from device_plan import commit
from interleave import Call, interleaved, quartiles

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "img" / "spherical.svg"
CLASSES = (50_000, 100_000, 200_000, 400_000, 800_000)
LR = 0.1


def spherical_step(head: Any, x: Tensor) -> Call:
    """Z-loss on a factored weight. New classes each time, as in training, so that rows of V are not in cache already."""

    def step() -> None:
        x.grad = None
        head(x, torch.randint(head.num_classes, x.shape[:1], device=x.device)).backward()
        head.step()

    return step


def softmax_step(classes: int, x: Tensor) -> Call:
    """Fused linear cross entropy, and what torch.optim.SGD does to the weight."""
    weight = torch.randn(classes, x.shape[1], device=x.device).mul_(1e-3).requires_grad_()

    def step() -> None:
        x.grad = weight.grad = None
        target = torch.randint(classes, x.shape[:1], device=x.device)
        fastloss.linear_cross_entropy(x, weight, target).backward()
        with torch.no_grad():
            assert weight.grad is not None
            weight.add_(weight.grad, alpha=-LR)

    return step


def measure(features: int, batch: int, sizes: list[int], budget: float, rounds: int) -> dict[str, Any]:
    """Seconds of both for each number of classes: ours interleaved over all sizes, and with softmax size by size."""
    torch.manual_seed(0)
    x = torch.randn(batch, features, device=DEVICE, requires_grad=True)
    heads = {size: fastloss.nn.SphericalLinear(features, size, lr=LR, device=DEVICE) for size in sizes}
    ours = {str(size): spherical_step(head, x) for size, head in heads.items()}
    first = str(sizes[0])
    flat = interleaved(ours, first, budget, (rounds, 10 * rounds))
    records = []
    for size in sizes:
        calls = {"spherical": ours[str(size)], "softmax": softmax_step(size, x)}
        pair = interleaved(calls, "spherical", budget / len(sizes), (3, rounds))
        growth = [a / b for a, b in zip(flat.times(str(size)), flat.times(first), strict=True)]
        records.append(
            {
                "classes": size,
                "spherical": quartiles(flat.times(str(size))),
                "growth": quartiles(growth),  # over the smallest size, of the same round
                "stabilize": quartiles(interleaved({"": heads[size].stabilize}, "", 1.0, (3, 5)).times("")),
                "softmax": quartiles(pair.times("softmax")),
                "speedup": quartiles(
                    [s / o for s, o in zip(pair.times("softmax"), pair.times("spherical"), strict=False)]
                ),
            }
        )
    return {"features": features, "batch": batch, "dtype": "float32", "records": records}


def table(run: dict[str, Any]) -> str:
    """Medians, and quartiles of the ratios."""
    lines = [
        f"{'classes':>9} {'spherical ms':>13} {'over smallest':>20} {'stabilize ms':>13} {'softmax ms':>11} {'speed-up':>24}"
    ]
    for r in run["records"]:
        growth, speedup = r["growth"], r["speedup"]
        lines.append(
            f"{r['classes']:>9,} {r['spherical']['median'] * 1e3:>13.2f} "
            f"{growth['median']:>6.2f} [{growth['q1']:.2f}, {growth['q3']:.2f}] "
            f"{r['stabilize']['median'] * 1e3:>13.1f} {r['softmax']['median'] * 1e3:>11.1f} "
            f"{speedup['median']:>8.1f} [{speedup['q1']:.1f}, {speedup['q3']:.1f}]"
        )
    return "\n".join(lines)


def plot(run: dict[str, Any], path: Path) -> None:
    """Time of a step over the number of classes, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastloss", "svg.fonttype": "none", "font.family": "sans-serif"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    classes = [r["classes"] for r in run["records"]]
    for name, label, color in (
        ("softmax", "fused softmax cross entropy + SGD", "#8b949e"),
        ("spherical", "SphericalLinear, Z-loss", "#1a7f64"),
    ):
        milliseconds = [r[name]["median"] * 1e3 for r in run["records"]]
        axes.plot(classes, milliseconds, "o-", label=label, color=color)
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="ms for forward, backward and update")
    axes.set_xticks(classes, [f"{size // 1000}k" if size >= 1000 else str(size) for size in classes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"{run['features']} features, batch {run['batch']}, {run['machine']['cpu']}, {run['machine']['threads']} threads",
        fontsize=9,
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each half of the measurement")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, help="the JSON file; default: bench/results/MACHINE/spherical/DATE-COMMIT.json"
    )
    parser.add_argument("--plot", type=Path, nargs="?", const=IMAGE, help="also draw; default docs/img/spherical.svg")
    options = parser.parse_args(arguments)
    run = measure(options.features, options.batch, sorted(options.classes), options.budget, options.rounds)
    now = datetime.datetime.now(datetime.timezone.utc)
    run["machine"] = {"name": machine(), "cpu": cpu_model(), "threads": torch.get_num_threads(), "device": DEVICE}
    run |= {"torch": torch.__version__, "commit": commit(), "datetime": now.isoformat(timespec="seconds")}
    path = options.out or RESULTS / machine() / "spherical" / f"{now:%Y-%m-%d}-{commit()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run))
    print(path)
    if options.plot:
        plot(run, options.plot)
        print(options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
