"""What is in the wheel, how big it is, and that importing stays lean and never fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, **env: str) -> str:
    import os

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11+")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {"fastloss.triton_kernels"}
    for init in (ROOT / "python" / "fastloss").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT / "python").parts))
    assert set(project["tool"]["setuptools"]["packages"]) == found
    assert not any("torch" in r for r in project["build-system"]["requires"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing of this tree's own build is in it."""
    source, out = tmp_path_factory.mktemp("source") / "fastloss", tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "tests"),
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source], check=True
    )
    return next(out.glob("*.whl"))


def test_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "fastloss/py.typed",
        "fastloss/_C.pyi",
        "fastloss/triton_kernels/row_stats.py",
        "fastloss/losses/__init__.py",
    ):
        assert needed in names
    assert any(n.startswith("fastloss/_C.") and n.endswith(".so") for n in names)
    assert wheel.stat().st_size < 1_000_000, f"{wheel.stat().st_size} bytes"
    assert not any(n.startswith(("triton_kernels/", "tests/", "bench/")) for n in names)


def test_without_a_compiler_it_is_pure_python(tmp_path: Path) -> None:
    """Installs, imports, computes, and says what is missing."""
    source = tmp_path / "fastloss"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "tests"),
    )
    target = tmp_path / "site"
    import os

    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env.update(PATH=str(bin_dir), FASTLOSS_CUDA="0")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source],
        check=True, env=env,
    )  # fmt: skip
    assert not list(target.glob("fastloss/_C*.so"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"  # not this tree
        "import torch, fastloss; z, y = torch.randn(3, 5), torch.tensor([1, 2, 3]);"
        "print(fastloss.__file__, float(fastloss.cross_entropy(z, y)), fastloss.explain('row_stats', z))"
    )
    out = python(code, PYTHONPATH=str(target))
    assert str(target) in out and "compiled extension is missing" in out and "C++17 compiler" in out


def test_import_is_lean() -> None:
    loaded = python(
        "import sys, fastloss; print([m for m in ('triton', 'matplotlib', 'rich', 'transformers') if m in sys.modules])"
    )
    assert loaded == python(
        "import sys, torch; print([m for m in ('triton', 'matplotlib', 'rich', 'transformers') if m in sys.modules])"
    )


def test_typed() -> None:
    assert (ROOT / "python" / "fastloss" / "py.typed").exists()
