"""What is installed, what runs here, and whether it is right: `python -m fastloss.info` or `fastloss info`.

Imports nothing but the standard library until it runs, and guards every probe, so that `python path/to/fastloss/info.py`
also reports on an installation that cannot be imported. Exit code 1 when something is broken or computes wrong numbers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
ROWS, FEATURES, CLASSES = 24, 64, 203  # of the tensors that are tried: small, with a ragged number of classes


def guarded(probe: Callable[[], Any]) -> Any:
    """The probe's result, or {"error": why there is none}."""
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _imports(name: str) -> str | None:
    """None if the module can be imported, else the reason."""
    result = guarded(lambda: importlib.import_module(name) and None)
    return result["error"] if result else None


def versions() -> dict[str, str]:
    """Of everything that takes part; without importing it where that can be avoided."""
    found = {"python": platform.python_version()}
    for package in ("fastloss", "torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        match = re.search(r"\s(\d+\.[\d.]+)\s", driver.read_text())
        found["NVIDIA driver"] = match.group(1) if match else "unknown"
    elif shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        found["NVIDIA driver"] = answer.stdout.split("\n")[0] or "nvidia-smi gives no answer"
    else:
        found["NVIDIA driver"] = "none found"
    return found


def machine() -> dict[str, Any]:
    """Operating system and CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "system": platform.platform(),
        "cpu": match.group(1) if match else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def torch_runtime() -> dict[str, Any]:
    """What torch says of itself and of the GPUs."""
    import torch

    gpus = []
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(k)
        gpus.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return {"CUDA of torch": torch.version.cuda or "none", "threads": torch.get_num_threads(), "gpus": gpus}


def extension() -> dict[str, Any]:
    """The compiled part: what it was built for and what it has chosen here, or why there is none."""
    from fastloss import compiled

    if compiled.MISSING:
        return {"built": False, "reason": compiled.MISSING}
    c: Any = compiled._C
    return {"built": True, "isa": c.isa_name(c.best_isa()), "cuda": bool(c.cuda), "archs": c.archs}


def devices() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{k}" for k in range(count))]


def _example(device: str, dtype: str) -> dict[str, Any]:
    """One value for every argument name of the ops; names not listed here keep the default of the op's schema."""
    import torch

    from fastloss.contract import NUM_COEFS, NUM_EPILOGUES, NUM_PAIR_COLUMN_STATS, NUM_PAIR_STATS, NUM_STATS

    def new(*shape: int, kind: str = "float32") -> Any:
        return torch.zeros(shape, device=device, dtype=getattr(torch, kind))

    return {
        "logits": new(ROWS, CLASSES, kind=dtype), "x": new(ROWS, FEATURES, kind=dtype),
        "w": new(CLASSES, FEATURES, kind=dtype), "target": new(ROWS, kind="int64"), "coef": new(NUM_COEFS, ROWS),
        "stats": new(NUM_STATS, ROWS), "argmax": new(0, kind="int64"), "epilogue": new(NUM_EPILOGUES, ROWS),
        "grad_weight": new(CLASSES, FEATURES), "dlogits": new(ROWS, CLASSES, kind=dtype), "upstream": new(),
        "factor": new(), "input": new(ROWS, CLASSES, kind=dtype), "labels": new(ROWS, CLASSES, kind=dtype),
        "dinput": new(ROWS, CLASSES, kind=dtype),
        "seed": new(kind="int64"), "streams": new(ROWS, kind="int64"),
        "q": new(ROWS, FEATURES, kind=dtype), "k": new(CLASSES, FEATURES, kind=dtype), "row_scale": new(ROWS),
        "row_grad": new(NUM_PAIR_STATS, ROWS), "column_grad": new(NUM_PAIR_COLUMN_STATS, 0), "kept": new(0),
        "pointer": new(ROWS + 1, kind="int64"), "source": new(ROWS, kind="int64"),
    }  # fmt: skip


def _example_of(op: str, device: str) -> dict[str, Any]:
    """The arguments whose names mean something else in other ops."""
    import torch

    from fastloss.contract import NUM_PAIR_COLUMN_STATS, NUM_PAIR_MAP_STATS, NUM_PAIR_STATS

    def new(*shape: int, kind: str = "float32") -> Any:
        return torch.zeros(shape, device=device, dtype=getattr(torch, kind))

    return {
        "pair_stats_backward": {"rows": new(NUM_PAIR_STATS, ROWS), "columns": new(NUM_PAIR_COLUMN_STATS, 0)},
        "pair_map_backward": {"grad": new(NUM_PAIR_MAP_STATS, ROWS)},
        "pair_histogram_backward": {"grad": new(2, 2)},
        "edge_sum": {"weight": new(ROWS)},
        "edge_dot": {"rows": new(ROWS, kind="int64"), "columns": new(ROWS, kind="int64")},
    }.get(op, {})


def kernels() -> list[dict[str, str]]:
    """For every op, device, dtype and backend: "ok", or the kernel's own reason why not."""
    import torch

    from fastloss import registry
    from fastloss.lossless import selftest as lossless_selftest
    from fastloss.quant import selftest as quant_selftest

    table = []
    for device in devices():
        for dtype in DTYPES:
            common = _example(device, dtype)
            for op in registry.ops():
                example = {**common, **_example_of(op, device)}
                arguments = getattr(torch.ops.fastloss, op).default._schema.arguments
                unknown = [a.name for a in arguments if a.name not in example and not _optional(a)]
                values = [example.get(a.name, a.default_value if a.has_default_value() else None) for a in arguments]
                for selftest in (lossless_selftest, quant_selftest):
                    if op in selftest.OPS:
                        values, unknown = list(selftest.arguments(op, common["x"], common["w"])), []
                for backend in registry.BACKENDS:
                    kernel = registry._kernels[op].get(backend)
                    if kernel is None:
                        says: Any = "has no such kernel"
                    elif unknown:
                        says = f"not tried: info has no example of {', '.join(unknown)}"
                    else:
                        says = guarded(partial(kernel.why_not, *values)) or "ok"
                    says = says["error"] if isinstance(says, dict) else says
                    table.append({"op": op, "device": device, "dtype": dtype, "backend": backend, "says": says})
    return table


def _optional(argument: Any) -> bool:
    return argument.has_default_value() or argument.type.kind() == "OptionalType"


def _self_test(table: list[dict[str, str]]) -> list[dict[str, Any]]:
    from fastloss.info_selftest import self_test

    return self_test(table)


def report() -> dict[str, Any]:
    """Everything, as plain data."""
    here = Path(__file__).resolve().parent
    # run by path, this folder is on sys.path, and its files would stand in for modules of the same name
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]
    if importlib.util.find_spec("fastloss") is None:
        sys.path.append(str(here.parent))
    broken = {name: reason for name in ("torch", "fastloss") if (reason := _imports(name))}
    everything = {
        "versions": guarded(versions), "machine": guarded(machine), "broken": broken,
        "torch": guarded(torch_runtime) if "torch" not in broken else {},
    }  # fmt: skip
    if not broken:
        table = guarded(kernels)
        tested = guarded(partial(_self_test, table)) if isinstance(table, list) else []
        everything |= {"extension": guarded(extension), "kernels": table, "self_test": tested}
    return everything


def healthy(r: dict[str, Any]) -> bool:
    """Nothing is broken, no probe failed, and every self-test that ran has passed."""
    sections = [value for value in r.values() if isinstance(value, dict)]
    if r["broken"] or any("error" in s for s in sections):
        return False
    return bool(r["self_test"]) and all(t["passed"] for t in r["self_test"])


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _kernel_lines(table: list[dict[str, str]]) -> list[str]:
    """A table for each device; dtypes that say the same share a cell, and reasons become footnotes."""
    notes: dict[str, int] = {}
    lines: list[str] = []
    backends = list(dict.fromkeys(r["backend"] for r in table))
    for device in dict.fromkeys(r["device"] for r in table):
        rows = [["op", *backends]]
        for op in dict.fromkeys(r["op"] for r in table):
            row = [op]
            for backend in backends:
                key = {"op": op, "device": device, "backend": backend}
                said = {r["dtype"]: r["says"] for r in table if key.items() <= r.items()}
                marks = {k: s if s == "ok" else f"[{notes.setdefault(s, len(notes) + 1)}]" for k, s in said.items()}
                each = ", ".join(f"{k} {mark}" for k, mark in marks.items())
                row.append(each if len(set(marks.values())) > 1 else next(iter(marks.values())))
            rows.append(row)
        lines += [f"\nkernels on {device} ({', '.join(DTYPES)})", *_columns(rows)]
    return lines + [f"  [{number}] {reason}" for reason, number in notes.items()]


def text(r: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for title in ("versions", "machine", "torch", "extension"):
        if r.get(title):
            lines += [f"\n{title}", *_columns([[k, _words(v)] for k, v in r[title].items()])]
    for name, reason in r["broken"].items():
        lines += ["", f"BROKEN: `import {name}` fails: {reason}"]
    if isinstance(table := r.get("kernels"), dict):
        lines += ["", f"BROKEN: the kernels cannot be listed: {table['error']}"]
    elif table:
        lines += _kernel_lines(table)
    if isinstance(tests := r.get("self_test"), dict):
        lines += ["", f"BROKEN: the self-test cannot run: {tests['error']}"]
    elif tests:
        rows = [["case", "device", "dtype", "backend", "max error", "allowed", ""]]
        for t in tests:
            error = f"{t['error']:.1e}" if isinstance(t["error"], float) else t["error"][:80]
            verdict = "PASS" if t["passed"] else "FAIL"
            rows.append([t["case"], t["device"], t["dtype"], t["backend"], error, f"{t['allowed']:.1e}", verdict])
        lines += [
            "\nself-test: forward and backward; errors against fp64, relative to the largest value",
            *_columns(rows),
        ]
        lines += ["", f"{sum(t['passed'] for t in tests)} of {len(tests)} passed"]
    return "\n".join(lines).lstrip("\n")


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ("; ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def main(argv: list[str] | None = None) -> int:
    """Prints the report; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="fastloss info", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    arguments = parser.parse_args(argv)
    r = report()
    print(json.dumps(r, indent=1, default=str) if arguments.json else text(r))
    return 0 if healthy(r) else 1


if __name__ == "__main__":
    sys.exit(main())
