"""What a device check found, for people: one line a kernel. bench/device_check.py prints it last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kernel_lines(out: Path) -> list[dict[str, Any]]:
    """What device_kernels.py has written so far; the last line may be cut."""
    path = out / "kernels.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def table(out: Path) -> str:
    """One line a kernel: time, rate, part of the ceiling, error against the reference."""
    lines = kernel_lines(out)
    copy = next((line["copy_gb_s"] for line in lines if "copy_gb_s" in line), None)
    rows = [f"device copy: {copy:.0f} GB/s" if copy else "device copy: not measured"]
    for line in lines:
        if "finished" not in line:
            continue
        name = f"{line['family']:6s} {line['mode']:8s} {line['dtype']:8s} {'x'.join(map(str, line['shape'])):16s}"
        if "error" in line:
            rows.append(f"{name} ERROR {line['error'][:120]}")
            continue
        for impl, time_ms in line["ms"].items():
            ms = time_ms["median"]
            if "nbytes" in line:
                rate = line["nbytes"] / ms / 1e6
                what = f"{rate:7.0f} GB/s {100 * rate / copy if copy else 0:4.0f} % of copy"
            else:
                gemms = line["ms"].get("gemms", {}).get("median")
                what = f"{line['flops'] / ms / 1e9:7.1f} TFLOP/s {ms / gemms if gemms else 0:5.2f} x GEMMs"
            error = f"  error {line['errors'][impl]:.1e}" if impl in line["errors"] else ""
            extra = line.get("extra_bytes", {}).get(impl)
            rows.append(
                f"{name} {impl:16s} {ms:9.3f} ms {what}{error}{f'  +{extra >> 20} MiB' if extra is not None else ''}"
            )
    return "\n".join(rows)


def problems(lines: list[dict[str, Any]]) -> list[str]:
    """Cases that raised, and results that are not the reference's."""
    found = []
    for line in lines:
        name = f"{line.get('family')} {line.get('mode')} {line.get('dtype')}"
        if "error" in line:
            found.append(f"{name}: {line['error'][:80]}")
        limit = 1e-3 if line.get("dtype") == "float32" else 2e-2
        found += [f"{name} {impl}: error {e:.1e}" for impl, e in line.get("errors", {}).items() if not e < limit]
        found += [f"{name} {impl}: {why[:80]}" for impl, why in line.get("failed", {}).items() if "fastloss" in impl]
    return found
