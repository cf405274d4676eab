"""`fastloss info`: it tells what runs, finds wrong numbers, and still speaks when the installation is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastloss
from fastloss import __main__, info, registry


def test_report_covers_every_op_and_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert not report["broken"]
    listed = {(r["op"], r["backend"]) for r in report["kernels"]}
    assert listed == {(op, backend) for op in registry.ops() for backend in registry.BACKENDS}
    assert not [r for r in report["kernels"] if r["says"].startswith("not tried")]
    ran = {op for t in report["self_test"] for op in t["ops"] if t["backend"] == "reference"}
    assert ran == set(registry.ops())


def test_table_agrees_with_explain() -> None:
    logits, target = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for line in fastloss.explain("row_stats", logits, target).splitlines()[1:]:
        backend, reason = line.split(maxsplit=1)
        key = {"op": "row_stats", "device": "cpu", "dtype": "float32", "backend": backend}
        (said,) = [r["says"] for r in info.kernels() if key.items() <= r.items()]
        assert said == reason


@pytest.mark.parametrize(
    ("op", "case"),
    [("row_stats_backward", "rows and their backward"), ("cross_entropy", "cross_entropy"), ("edge_sum", "edges")],
)
def test_self_test_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, op: str, case: str) -> None:
    right = registry._kernels[op]["reference"]

    def wrong(*arguments: object) -> object:
        out = right.function(*arguments)
        gradient = out if isinstance(out, torch.Tensor) else out[-1]
        gradient[0] *= 1.1
        return out

    monkeypatch.setitem(registry._kernels[op], "reference", right._replace(function=wrong))
    report = info.report()
    failed = {t["case"]: t["ops"] for t in report["self_test"] if not t["passed"]}
    assert case in failed and all(op in ops for ops in failed.values())
    assert not info.healthy(report)
    assert "FAIL" in info.text(report)


def test_a_kernel_that_raises_is_a_failure_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: object) -> object:
        raise RuntimeError("no such instruction")

    kernel = registry._kernels["row_stats"]["reference"]
    monkeypatch.setitem(registry._kernels["row_stats"], "reference", kernel._replace(function=raises))
    report = info.report()
    assert not info.healthy(report)
    assert "no such instruction" in info.text(report)


def test_self_test_leaves_the_dispatch_as_it_was() -> None:
    with fastloss.use_backend("reference"):
        assert info.healthy(info.report())
        assert registry.forced() == "reference"


def test_speaks_when_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so is not there')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, info.__file__], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "BROKEN: `import torch` fails: ImportError: libtorch_cpu.so is not there" in done.stdout
    assert "BROKEN: `import fastloss` fails" in done.stdout
    assert "versions" in done.stdout and "Traceback" not in done.stderr


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == f"fastloss {fastloss.__version__}"
    assert __main__.main(["bench", "--short", "--device", "cpu", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["cross_entropy", "linear_cross_entropy"]
    with pytest.raises(SystemExit) as stop:
        __main__.main(["bench", "--repeats", "0"])
    assert stop.value.code == 2 and "got 0" in capsys.readouterr().err


def test_bench_runs_the_folder_of_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "test_one.py").write_text("import pytest\ndef test_one(): pytest.exit('ran', 3)\n")
    monkeypatch.chdir(tmp_path)
    assert __main__._own_bench_folder() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fastloss"\n')
    assert __main__._own_bench_folder() == Path("bench")
    assert __main__.main(["bench"]) == 3
