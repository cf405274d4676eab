"""The command line: `fastloss` or `python -m fastloss`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, info
from .lossless import cli as lossless_cli


def _own_bench_folder() -> Path | None:
    """The bench folder of a fastloss checkout that is the working directory."""
    project = Path("pyproject.toml")
    is_ours = project.exists() and 'name = "fastloss"' in project.read_text(encoding="utf-8")
    return Path("bench") if is_ours and any(Path("bench").glob("*.py")) else None


def _medians(ways: dict[str, Callable[[], Any]], repeats: int, wait: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each way; they take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(repeats + 1):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            way()
            wait()
            if k:  # the first call sets things up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _short_comparison(device: str, dtype_name: str, repeats: int) -> None:
    """Forward and backward of both losses against torch at one shape."""
    import torch
    import torch.nn.functional as F

    import fastloss

    dtype = getattr(torch, dtype_name)
    rows, features, vocab = (8192, 1024, 131072) if device == "cuda" else (512, 256, 32768)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    x = torch.randn(rows, features, device=device, dtype=dtype, requires_grad=True)
    w = (torch.randn(vocab, features, device=device, dtype=dtype) / features**0.5).requires_grad_()
    logits = torch.randn(rows, vocab, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(vocab, (rows,), device=device)

    def backward(loss: Callable[[], torch.Tensor], *operands: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), operands)

    comparisons = {
        f"cross_entropy {rows} x {vocab}": {
            "torch": backward(lambda: F.cross_entropy(logits, target), logits),
            "fastloss": backward(lambda: fastloss.cross_entropy(logits, target), logits),
        },
        f"linear_cross_entropy {rows} x {features} x {vocab}": {
            "torch": backward(lambda: F.cross_entropy(F.linear(x, w), target), x, w),
            "fastloss": backward(lambda: fastloss.linear_cross_entropy(x, w, target), x, w),
        },
    }
    print(f"forward and backward, {dtype_name} on {device}, median of {repeats} in turns")
    print(f"{'':42s}{'torch':>12s}{'fastloss':>12s}{'ratio':>9s}")
    for name, ways in comparisons.items():
        ms = _medians(ways, repeats, wait)
        ratio = ms["torch"] / ms["fastloss"]
        print(f"{name:42s}{ms['torch']:9.1f} ms{ms['fastloss']:9.1f} ms{ratio:8.2f}x")


def _bench(arguments: argparse.Namespace) -> int:
    folder = None if arguments.short else _own_bench_folder()
    if folder:
        return subprocess.call([sys.executable, "-m", "pytest", "-q", str(folder)])
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _short_comparison(device, arguments.dtype, arguments.repeats)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastloss", description="Fused loss and head kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastloss {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = commands.add_parser("info", help="what is installed, which kernels run here, and a self-test")
    about.add_argument("--json", action="store_true", help="print the whole report as JSON")
    bench = commands.add_parser("bench", help="in a fastloss checkout its bench folder, elsewhere a short comparison")
    bench.add_argument("--short", action="store_true", help="the short comparison, in a checkout too")
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="of the short comparison (default: a GPU if there is one)"
    )
    bench.add_argument("--dtype", choices=info.DTYPES, default="float32", help="default: %(default)s")
    bench.add_argument("--repeats", type=int, default=5, help="calls of each way (default: %(default)s)")
    lossless_cli.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return info.main(["--json"] if arguments.json else [])
    if arguments.command in lossless_cli.COMMANDS:
        return lossless_cli.run(arguments)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    return _bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
