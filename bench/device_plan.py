"""What a device check would run on, and what it would lack: asked before anything is built."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".whl"
NEEDED = {"torch": "", "numpy": "", "setuptools": ">=77", "pybind11": ">=2.13", "ninja": "", "pytest": ">=8"}


def missing() -> list[str]:
    """Packages that are neither installed nor carried."""
    carried = {re.split(r"-\d", wheel.name)[0].lower().replace("_", "-") for wheel in WHEELS.glob("*.whl")}
    return [f"{n}{v}" for n, v in NEEDED.items() if n not in carried and importlib.util.find_spec(n) is None]


def commit() -> str:
    """The commit; FASTLOSS_COMMIT where the tree has travelled without its history."""
    if named := os.environ.get("FASTLOSS_COMMIT"):
        return named
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def gpu_facts() -> dict[str, Any]:
    """What the results depend on. Asked in a process of its own, so that this one holds no GPU memory."""
    facts: dict[str, Any] = {"gpu": None, "arch": None, "commit": commit(), "date": str(datetime.date.today())}
    facts["python"] = sys.version.split()[0]
    script = (
        "import json, torch\n"
        "g = torch.cuda.is_available()\n"
        "p = torch.cuda.get_device_properties(0) if g else None\n"
        "try:\n import triton; t = triton.__version__\n"
        "except ImportError: t = None\n"
        "print(json.dumps(dict(gpu=p.name if g else None, arch=f'{p.major}{p.minor}' if g else None,"
        " torch=torch.__version__, triton=t)))"
    )
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if asked.returncode == 0:
        facts.update(json.loads(asked.stdout.splitlines()[-1]))
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    if facts["gpu"] and shutil.which("nvidia-smi"):
        facts["driver, clocks, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def plan(facts: dict[str, Any], budget: dict[str, int], minutes: float) -> str:
    lacking = missing()
    carry = "nothing" if not lacking else f"{', '.join(lacking)} as wheels under .whl/"
    return "\n".join([
        f"GPU: {facts['gpu'] or 'none here'} (arch {facts['arch'] or '-'}), torch {facts.get('torch')}, "
        f"triton {facts.get('triton')}, Python {facts['python']}, commit {facts['commit']}",
        f"nvcc: {shutil.which('nvcc') or 'not on PATH'}; compute-sanitizer: {shutil.which('compute-sanitizer') or 'not on PATH'}",
        f"to carry: {carry}",
        *(f"{name:10s} at most {seconds} s" for name, seconds in budget.items()),
        f"all of it at most {minutes:.1f} min",
    ])  # fmt: skip
