"""What is installed, what runs here, and whether it is right: `python -m fastloss.info` or `fastloss info`.

Imports nothing but the standard library until it runs, and guards every probe, so that `python path/to/fastloss/info.py`
also reports on an installation that cannot be imported. Exit code 1 when something is broken or computes wrong numbers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    from fastloss.contract import NUM_COEFS, NUM_EPILOGUES, NUM_STATS

    def new(*shape: int, kind: str = "float32") -> Any:
        return torch.zeros(shape, device=device, dtype=getattr(torch, kind))

    return {
        "logits": new(ROWS, CLASSES, kind=dtype), "x": new(ROWS, FEATURES, kind=dtype),
        "w": new(CLASSES, FEATURES, kind=dtype), "target": new(ROWS, kind="int64"), "coef": new(NUM_COEFS, ROWS),
        "stats": new(NUM_STATS, ROWS), "argmax": new(0, kind="int64"), "epilogue": new(NUM_EPILOGUES, ROWS),
        "grad_weight": new(CLASSES, FEATURES), "dlogits": new(ROWS, CLASSES, kind=dtype), "upstream": new(),
        "factor": new(),
    }  # fmt: skip


def kernels() -> list[dict[str, str]]:
    """For every op, device, dtype and backend: "ok", or the kernel's own reason why not."""
    import torch

    from fastloss import registry

    table = []
    for device in devices():
        for dtype in DTYPES:
            example = _example(device, dtype)
            for op in registry.ops():
                arguments = getattr(torch.ops.fastloss, op).default._schema.arguments
                unknown = [a.name for a in arguments if a.name not in example and not _optional(a)]
                values = [example.get(a.name, a.default_value if a.has_default_value() else None) for a in arguments]
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


def _cases() -> dict[str, tuple[tuple[str, ...], Callable[..., list[Any]]]]:
    """Name -> (the ops it runs through; what calls them as a user would, and returns the loss and every gradient).

    Every loss is the sum of torch's cross entropy over the rows.
    """
    import torch

    import fastloss
    from fastloss import registry
    from fastloss.contract import NUM_EPILOGUES
    from fastloss.reference import epilogue_coefficients

    def graded(loss: Callable[..., Any]) -> Callable[..., list[Any]]:
        def run(*operands: Any, target: Any) -> list[Any]:
            value = loss(*operands, target)
            return [value, *torch.autograd.grad(value, operands)]

        return run

    def into_a_buffer(x: Any, w: Any, target: Any) -> list[Any]:
        buffer = torch.zeros(w.shape, device=w.device)
        value = fastloss.linear_cross_entropy(x, w, target, reduction="sum", grad_weight=buffer)
        return [value, *torch.autograd.grad(value, (x,)), buffer]

    def made_again(z: Any, target: Any) -> list[Any]:
        loss = fastloss.cross_entropy(z, target, reduction="sum")
        with torch.no_grad():  # the gradient of twice the loss, then halved
            epilogue = torch.zeros(NUM_EPILOGUES, len(z), device=z.device)
            epilogue[0] = 2
            stats, argmax = registry.run("row_stats", z, target)
            coef, gradient, two = epilogue_coefficients(stats, epilogue, False), torch.zeros_like(z), epilogue[0, 0]
            registry.run("row_stats_backward_unless_one_", gradient, two, coef, stats, argmax, z, target)
            registry.run("scale_unless_one_", gradient, two / 4)
        return [loss, gradient]

    head = fastloss.linear_cross_entropy
    backward = "linear_row_stats_backward"
    return {
        "rows and their backward": (
            ("row_stats", "row_stats_backward"), graded(lambda z, t: -fastloss.row_stats(z, t).logp.sum())
        ),
        "cross_entropy": (("cross_entropy",), graded(lambda z, t: fastloss.cross_entropy(z, t, reduction="sum"))),
        "gradient made again, scaled": (
            ("cross_entropy", "row_stats", "row_stats_backward_unless_one_", "scale_unless_one_"), made_again
        ),
        "linear rows and their backward": (
            ("linear_row_stats", backward), graded(lambda x, w, t: head(x, w, t, reduction="none").sum())
        ),
        "linear rows, dW into a buffer": (("linear_row_stats", backward + "_into"), into_a_buffer),
        "linear_cross_entropy": (
            ("linear_cross_entropy",), graded(lambda x, w, t: head(x, w, t, reduction="sum"))
        ),
    }  # fmt: skip


def _worst(run: Callable[..., list[Any]], operands: Iterable[Any], target: Any) -> float:
    """The largest error of the loss and of every gradient against fp64, each relative to its largest value."""
    import torch
    import torch.nn.functional as F

    got = run(*(t.clone().requires_grad_() for t in operands), target=target)
    wide = [t.double().cpu().requires_grad_() for t in operands]
    loss = F.cross_entropy(wide[0] if len(wide) == 1 else F.linear(*wide), target.cpu(), reduction="sum")
    expected = [loss, *torch.autograd.grad(loss, wide)]
    pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(got, expected, strict=True)]
    errors = [(a - b).abs().max() / b.abs().max() for a, b in pairs]
    return max(float(torch.nan_to_num(e, nan=float("inf"))) for e in errors)


@contextmanager
def _on(backend: str, device_type: str) -> Iterator[None]:
    """Every op on this backend. It also comes first in the order of preference: autograd runs a GPU's backward in
    threads of its own, which do not see what `use_backend` says in this one."""
    from fastloss import registry

    before = registry.ORDER[device_type]
    registry.ORDER[device_type] = (backend, *(b for b in before if b != backend))
    try:
        with registry.use_backend(backend):
            yield
    finally:
        registry.ORDER[device_type] = before


def self_test(table: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A forward and backward of every case on every device, dtype and backend whose kernels say ok."""
    import torch

    from fastloss import registry

    says = {(r["op"], r["device"], r["dtype"], r["backend"]): r["says"] for r in table}
    results = []
    for device, dtype, backend in itertools.product(devices(), DTYPES, registry.BACKENDS):
        kind = getattr(torch, dtype)
        g = torch.Generator().manual_seed(0)
        x, w = (torch.randn(n, FEATURES, generator=g).to(device, kind) for n in (ROWS, CLASSES))
        w = w / 4  # logits of a few units, as a head has them
        target = torch.randint(CLASSES, (ROWS,), generator=g).to(device)
        # 16-bit logits are rounded once, by |z| eps / 2; float32 sums of 203 terms several times
        allowed = (16 if dtype == "float32" else 2) * torch.finfo(kind).eps
        for name, (ops, run) in _cases().items():
            if any(says.get((op, device, dtype, backend)) != "ok" for op in ops):
                continue
            operands = (x, w) if ops[0].startswith("linear") else (x @ w.T,)
            with _on(backend, device.split(":")[0]):
                error = guarded(partial(_worst, run, operands, target))
            broke = isinstance(error, dict)
            results.append({
                "case": name, "ops": list(ops), "device": device, "dtype": dtype, "backend": backend,
                "error": error["error"] if broke else error, "allowed": allowed,
                "passed": not broke and error <= allowed,
            })  # fmt: skip
    return results


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
        tested = guarded(lambda: self_test(table)) if isinstance(table, list) else []
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
