"""The demo at tiny settings: the three ways agree, the head is measured, the memory limit is real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "language_model.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit of the last part is Linux's")
def test_demo(tmp_path: Path) -> None:
    command = (
        "--device cpu --vocab 3000 --steps 3 --batch 4 --context 64 --width 32"
        " --large-vocab 100000 --large-rows 2048 --limit 700 --out"
    ).split()
    done = subprocess.run(
        [sys.executable, str(DEMO), *command, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "language_model.json").read_text())
    assert results["vocab"] == 3000
    ways = list(results["losses"])
    plain, ours = ways[0], "fastloss.linear_cross_entropy"
    assert len(ways) == (3 if hasattr(torch.nn, "LinearCrossEntropyOptions") else 2)
    assert all(len(losses) == 3 and losses[-1] < losses[0] for losses in results["losses"].values())
    assert results["largest_difference"] < 1e-4 and "LEAVES" not in done.stdout
    # 256 rows of 3000 float32 logits are 2.9 MiB; plain PyTorch holds at least two such tables
    assert results["head_bytes"][plain] > 2 * 256 * 3000 * 4
    assert "failed" in results["large"][plain] and "OUT OF MEMORY" in done.stdout
    assert results["large"][ours]["loss"] == pytest.approx(11.5, abs=0.5)  # log(100000) = 11.5
    assert results["large"][ours]["peak_bytes"] < 700 * 2**20


def test_help_names_every_setting() -> None:
    done = subprocess.run([sys.executable, str(DEMO), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for flag in ("--device", "--dtype", "--vocab", "--steps", "--out", "--limit"):
        assert flag in done.stdout
