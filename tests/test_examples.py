"""The examples at small settings: they run, and say what they are for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distillation() -> None:
    out = run("distillation.py", "--vocab", "500", "--steps", "6", "--batch", "4", "--context", "32", "--width", "16")
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", out)]
    assert len(losses) == 3 and all(0 < x < 7 for x in losses)
    stored, streamed = re.findall(r"loss ([\d.]+), +[\d.]+ ms", out)
    assert abs(float(stored) - float(streamed)) < 1e-4
    (gap,) = re.findall(r"differ by ([\de.-]+) relative", out)
    assert float(gap) < 1e-5


def test_noisy_labels() -> None:
    out = run("noisy_labels.py", "--epochs", "25")
    found = {name.strip(): float(x) for name, x in re.findall(r"^(.*?)test accuracy ([\d.]+)", out, re.M)}
    assert len(found) == 4
    plain = found.pop("cross entropy")
    assert all(x > plain for x in found.values()), found
