"""The benchmarks still run, the gate tells good from bad, the plots are drawn, the device check plans without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import device_check
import gate
import memory
import plot
from common import Group
from interleave import Measurement, interleaved

ROOT = Path(__file__).resolve().parent.parent
NAME = "cross_entropy forward+backward float32 512x128256 peaked"
CEILINGS = {"cpu": {NAME: {"ratios": {"torch": 0.2}, "warm": {"torch": 0.4}, "counts": {"extra_over_logits": 0.1}}}}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def run_of(ratio: float, warm: float = 0.3, extra: float = 0.05) -> dict[str, Any]:
    """A small run with one record, as pytest-benchmark writes it."""
    spread = {"q1": 0.9, "q3": 1.1, "rounds": 5}
    info = {
        "impl": "fastloss-cpp",
        "implementations": {
            "fastloss-cpp": {"median": ratio, **spread},
            "torch": {"median": 1.0, **spread},
        },
        "ratios": {"torch": {"median": ratio, **spread}},
        "warm": {"ratios": {"torch": {"median": warm, **spread}}},
        "peaks": {"fastloss-cpp": 105 << 20, "torch": 300 << 20},
        "gradient_bytes": 100 << 20, "logits_bytes": 100 << 20, "saved_bytes": 100 << 20, "extra_over_logits": extra,
    }  # fmt: skip
    machine = {"name": "some-cpu", "gpu": None, "cpu": {"brand_raw": "Some <CPU>"}, "threads": 2, "torch": "2.13"}
    return {"machine_info": machine, "benchmarks": [{"group": NAME, "fullname": "bench/x.py::t", "extra_info": info}]}


def test_every_benchmark_body_runs() -> None:
    done = python(
        "-m", "pytest", "-q", "bench", "--benchmark-disable", "-p", "no:cacheprovider", FASTLOSS_BENCH_TINY="1"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_record_holds_what_the_gate_reads(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    selected = ["bench/test_cross_entropy.py", "-k", "bfloat16 and normal"]
    done = python("-m", "pytest", "-q", *selected, f"--benchmark-json={out}", FASTLOSS_BENCH_TINY="1")
    assert done.returncode == 0, done.stdout[-3000:]
    (record,) = json.loads(out.read_text())["benchmarks"]
    info = record["extra_info"]
    assert "data" not in record["stats"]
    assert set(info["ratios"]) >= {"torch", "torch_compile"} and set(info["warm"]["ratios"]) >= {
        "torch",
        "torch_compile",
    }
    assert info["saved_bytes"] >= info["logits_bytes"], "the gradient made in the forward is saved"
    assert info["ratios"]["torch"]["rounds"] >= 3 and info["dtype"] == "bfloat16" and info["shape"] == [16, 96]


def test_interleaved_ratios_are_medians_of_pairs() -> None:
    order: list[str] = []
    measured = interleaved({"ours": lambda: order.append("o"), "bad": lambda: 1 / 0}, "ours", rounds=(3, 3))
    assert list(measured.seconds) == ["ours"] and "ZeroDivisionError" in measured.failed["bad"]
    paired = Measurement({"ours": [1.0, 10.0, 1.0], "torch": [2.0, 20.0, None]})
    assert paired.ratios("ours")["torch"]["median"] == 0.5  # the slow second round slowed both
    with pytest.raises(ZeroDivisionError):
        interleaved({"ours": lambda: 1 / 0}, "ours")


def test_memory_is_counted() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp().sum().backward(), (x,)) == 4000
    assert memory.saved_bytes(lambda: (x * x).sum().backward(), (x,)) == 0  # it keeps nothing but its operand
    group = Group("cross_entropy", "forward+backward", "float32", (256, 16384), "normal", "cpu")
    logits = 256 * 16384 * 4
    ours, torchs = (memory.peak_bytes(group, impl) for impl in ("fastloss-cpp", "torch"))
    assert logits * 0.95 < ours < logits * 1.5, "the gradient alone"
    assert torchs > logits * 1.9, "the gradient and the log-softmax"


@pytest.mark.parametrize(
    "run, failed",
    [
        (run_of(0.19), []),
        (run_of(0.21), []),  # over the ceiling, within the noise
        (run_of(0.23), ["ratio"]),
        (run_of(0.1, warm=0.5), ["warm"]),
        (run_of(0.1, extra=0.11), ["count"]),
    ],
)
def test_gate_verdicts(run: dict[str, Any], failed: list[str]) -> None:
    assert [row.what for row in gate.check(run, CEILINGS, None) if row.failed] == failed


def test_gate_measures_twice_before_it_fails() -> None:
    asked: list[str] = []

    def again(ratio: float) -> gate.Rerun:
        def rerun(records: list[gate.Record]) -> list[gate.Record]:
            asked.extend(record["fullname"] for record in records)
            return run_of(ratio)["benchmarks"]

        return rerun

    assert not any(row.failed for row in gate.check(run_of(0.3), CEILINGS, again(0.19)))
    assert any(row.failed for row in gate.check(run_of(0.3), CEILINGS, again(0.31)))
    assert asked == ["bench/x.py::t"] * 2
    assert any(row.failed for row in gate.check(run_of(0.1, extra=0.2), CEILINGS, again(0.1))), (
        "counts get no second try"
    )


def test_what_was_not_measured_fails() -> None:
    run = run_of(0.1)
    run["benchmarks"] = []
    rows = gate.check(run, CEILINGS, None)
    assert len(rows) == 3 and all(row.failed for row in rows)


def test_gate_command(tmp_path: Path) -> None:
    ceilings = tmp_path / "gate.json"
    ceilings.write_text(json.dumps(CEILINGS))
    for ratio, status in ((0.1, 0), (0.5, 1)):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(run_of(ratio)))
        done = python("bench/gate.py", str(path), "--ceilings", str(ceilings), "--no-rerun")
        assert done.returncode == status and ("FAIL" in done.stdout) == bool(status), done.stdout


def test_every_ceiling_names_a_group_that_is_measured() -> None:
    script = (
        "import test_cross_entropy as c, test_linear_cross_entropy as l, test_lossless as w, test_margin as m, test_pairs as p;"
        "print(c.SHAPES, l.SHAPES, w.TENSOR, w.PRODUCTS, m.LOGITS, m.HEAD, p.SHAPES)"
    )
    shapes = python("-c", script, PYTHONPATH="bench", FASTLOSS_BENCH_DEVICE="cpu", FASTLOSS_BENCH_TINY="0").stdout
    for name in json.loads(gate.CEILINGS.read_text())["cpu"]:
        _, _, dtype, shape, inputs = name.split()
        assert f"({shape.replace('x', ', ')})" in shapes and dtype in ("float32", "bfloat16", "float16"), name
        assert inputs in ("peaked", "normal"), name


def test_pairs_memory(tmp_path: Path) -> None:
    """The curve on small batches: a peak of ours for each, a table, a plot; who is not installed is a failure of one line."""
    out, image = tmp_path / "run.json", tmp_path / "image.svg"
    losses = ["fastloss-clip", "fastloss-ntxent", "metric_learning"]
    done = python(
        "bench/pairs_memory.py", "--sizes", "64", "128", "--features", "16", "--losses", *losses, "--limit", "2",
        "--out", str(out), "--plot", str(image),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(out.read_text())["records"]
    assert all("peak_bytes" in r for r in records if r["loss"].startswith("fastloss"))
    assert {r["loss"] for r in records} == set(losses) and "128" in done.stdout
    assert "fastloss, CLIP" in image.read_text()


def test_plots(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    source.write_text(json.dumps(run_of(0.25)))
    images = plot.draw(source, tmp_path / "img")
    assert [image.name for image in images] == ["some-cpu-time.svg", "some-cpu-memory.svg"]
    for image, ratio in zip(images, (0.25, 5 / 200), strict=True):
        root = ElementTree.parse(image).getroot()
        widths = [float(bar.get("width", 0)) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
        assert len(widths) == 2 and widths[0] / widths[1] == pytest.approx(ratio, abs=1e-3)
        assert "Some <CPU>" in "".join(root.itertext())


def test_device_check_plans_without_a_device() -> None:
    done = python("bench/device_check.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(stage in done.stdout for stage in device_check.STAGES) and "to carry" in done.stdout
    assert sum(device_check.BUDGET.values()) < 9.5 * 60


def test_device_check_writes_what_it_knows(tmp_path: Path) -> None:
    """The stages run without a GPU on tiny shapes; a stage that fails does not stop the next."""
    command = ["bench/device_check.py", "--without-gpu", "--only", "tests,sanitizer,kernels"]
    python(*command, OUT=str(tmp_path))
    report = json.loads((tmp_path / "device.json").read_text())
    assert set(report["stages"]) == {"tests", "sanitizer", "kernels"}
    assert report["stages"]["kernels"]["verdict"] == "ok"
    tests = report["stages"]["tests"]
    assert tests["verdict"] == "failed" and "skipped" in tests["note"], "nothing was checked, so nothing is ok"
    finished = [line for line in report["kernels"] if "finished" in line]
    assert finished and not [line for line in finished if "error" in line]
    assert all(error < 1e-2 for line in finished for error in line["errors"].values())


def test_sanitizer_script_calls_every_kernel() -> None:
    done = python("bench/sanitize.py", "--device", "cpu")
    assert done.returncode == 0 and "calls done" in done.stdout, done.stderr[-2000:]
