"""The `compare` fixture, and how results are kept. `python -m pytest bench` measures and writes a JSON file.

One test is one group: all implementations are timed in turn, and their ratios go into `extra_info` of the record of ours.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloss
from common import CUDA, RESULTS, TINY, Group, cpu_model, machine
from device_plan import commit
from implementations import Case, build
from interleave import interleaved, report
from memory import peak_bytes, saved_bytes, warm_report

Compare = Callable[..., None]


def _isa() -> str | None:
    extension = fastloss.compiled._C
    return None if extension is None else extension.isa_name(extension.best_isa())


def _facts(group: Group, case: Case) -> dict[str, Any]:
    return {
        "dtype": group.dtype, "shape": list(group.shape), "device": group.device, "group": group.as_dict(),
        "nbytes": case.nbytes, "flops": case.flops, "logits_bytes": case.logits_bytes,
        "threads": torch.get_num_threads(), "isa": _isa(), "tiny": TINY,
    }  # fmt: skip


def _rate(case: Case, seconds: float) -> dict[str, float]:
    if case.flops:
        return {"GFLOP/s": round(case.flops / seconds / 1e9, 1)}
    return {"GB/s": round(case.nbytes / seconds / 1e9, 2)}


def _peaks(group: Group, case: Case, impls: Sequence[str]) -> dict[str, Any]:
    """Peak bytes of each implementation, gradients included; how ours grows when the rows double.

    Extra memory is what goes beyond the gradients and a float32 accumulator of dW; it is counted in units of the logits.
    """
    peaks = {impl: peak_bytes(group, impl) for impl in impls if impl in case.calls}
    n, *rest = group.shape
    doubled = replace(group, shape=(2 * n, *rest))
    allowed, more = (c.gradient_bytes + c.accumulator_bytes for c in (case, build(doubled)))
    extra = max(0, peaks[case.ours] - allowed)
    twice = max(0, peak_bytes(doubled, case.ours) - more)
    return {
        "peak_bytes": peaks[case.ours],
        "peaks": peaks,
        "gradient_bytes": case.gradient_bytes,
        "accumulator_bytes": case.accumulator_bytes,
        "extra_bytes": extra,
        "extra_over_logits": round(extra / case.logits_bytes, 4),
        "growth_over_logits": round((twice - extra) / case.logits_bytes, 4),
    }


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """compare(group, warm=False, peaks=()): measure a group; `peaks` names the peers whose memory is probed with ours."""

    def run(group: Group, *, warm: bool = False, peaks: Sequence[str] = (), budget: float = 8.0) -> None:
        measuring = benchmark.enabled
        case = build(group)
        ours = case.ours
        info = benchmark.extra_info
        benchmark.group = group.name
        info.update(_facts(group, case))
        info.update(report(interleaved(case.calls, ours, budget, (5, 15) if measuring else (1, 1)), ours))
        info.update(_rate(case, info["implementations"][ours]["median"]))
        info["saved_bytes"] = saved_bytes(case.calls[ours], case.operands)
        benchmark.pedantic(case.calls[ours], rounds=3 if measuring else 1)
        del case.calls
        if measuring and warm and group.device == "cpu":
            info["warm"] = warm_report(group, budget)
        if measuring and peaks:
            info.update(_peaks(group, build(group), (ours, *peaks)))

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked slow runs when it is named, by its test or by `-m`, and in a test of the benchmarks."""
    if TINY or config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if "slow" in item.keywords]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


# ------------------------------------------------------------------------------------------ what is written where


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads the option
def pytest_configure(config: pytest.Config) -> None:
    """A whole, real run without --benchmark-json is filed under the machine's name."""
    options = config.option
    whole = not options.keyword and not any("::" in argument for argument in config.args)
    if whole and not TINY and not options.benchmark_json and not options.benchmark_disable and not options.collectonly:
        folder = RESULTS / machine()
        folder.mkdir(parents=True, exist_ok=True)
        options.benchmark_json = folder / f"{datetime.date.today()}-{_commit()}.json"


def _commit() -> str:
    """The short commit, with `-modified` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = commit()
    if found == "unknown" or subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode == 0:
        return found
    return found + "-modified"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["cpu"] = {"brand_raw": cpu_model(), "count": machine_info["cpu"].get("count")}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = _isa()
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = _version("triton")
    machine_info["name"] = machine()
    machine_info["gpu"] = _gpu() if CUDA else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, str]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
        )
        return dict(zip(query.split(","), run.stdout.splitlines()[0].split(", "), strict=False))
    except (OSError, IndexError):
        return {"name": torch.cuda.get_device_name()}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Only what is read later: no single timings."""
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)
        record["options"] = None
    json.dumps(output_json)  # what cannot be written shows here, with the test's name, not at the end of the session
