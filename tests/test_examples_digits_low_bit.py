"""The low-bit example at small settings: every network learns, packing changes nothing, and fewer bits are fewer bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "digits_low_bit.py"


def test_digits_low_bit() -> None:
    command = [sys.executable, str(EXAMPLE), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(.{20}) +([\d.]+) +([\d.]+) +([\d,]+) +([\d.]+) +[\d.]+ s$", done.stdout, re.M)
    found = {name.strip(): (float(a), float(p), int(size.replace(",", ""))) for name, a, p, size, _ in rows}
    assert len(found) == 6, done.stdout
    for name, (accuracy, packed, _) in found.items():
        assert accuracy > (0.6 if "convolutions" in name else 0.85), done.stdout
        assert abs(packed - accuracy) <= 0.004, done.stdout
    size = {name: entry[2] for name, entry in found.items()}
    assert size["binary"] < size["ternary"] < size["32 bits"] / 3
    assert size["4 bits"] < size["32 bits"] / 2
    assert size["binary convolutions"] < size["32-bit convolutions"] / 3
