"""What is in the wheel, how big it is, and that importing stays lean and never fails."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, **env: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def project() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest brings it along
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    found = {"fastloss.triton_kernels"}
    for init in (ROOT / "python" / "fastloss").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT / "python").parts))
    assert set(project()["tool"]["setuptools"]["packages"]) == found


def test_an_isolated_build_has_what_it_needs() -> None:
    """All that setup.py imports and runs, and not torch, whose CUDA build pip would fetch."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    needed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    needed |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    needed = {name.split(".")[0] for name in needed} - sys.stdlib_module_names | {"ninja"}
    assert {r.split(">")[0] for r in project()["build-system"]["requires"]} == needed


def copy_sources(to: Path) -> Path:
    """The sources alone, so that nothing of this tree's own build is in what is made of them."""
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "tests")
    return Path(shutil.copytree(ROOT, to, ignore=left_out))


def pip(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    flags = ("-q", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, "-m", "pip", arguments[0], *flags, *arguments[1:]], check=True, env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = copy_sources(tmp_path_factory.mktemp("source") / "fastloss"), tmp_path_factory.mktemp("wheel")
    pip("wheel", "-w", out, source)
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
    assert wheel.stat().st_size < 5_200_000, f"{wheel.stat().st_size} bytes"
    assert not any(n.startswith(("triton_kernels/", "tests/", "bench/")) for n in names)


def without_compilers(folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(folder), "FASTLOSS_CUDA": "0"}


def test_without_a_compiler_it_is_pure_python(tmp_path: Path) -> None:
    """Installs, imports, computes, and says what is missing."""
    target = tmp_path / "site"
    source = copy_sources(tmp_path / "fastloss")
    pip("install", "--target", target, source, env=without_compilers(tmp_path / "bin"))
    assert not list(target.glob("fastloss/_C*.so"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"  # not this tree
        "import torch, fastloss; z, y = torch.randn(3, 5), torch.tensor([1, 2, 3]);"
        "print(fastloss.__file__, float(fastloss.cross_entropy(z, y)), fastloss.explain('row_stats', z))"
    )
    out = python(code, PYTHONPATH=str(target))
    assert str(target) in out and "compiled extension is missing" in out and "C++17 compiler" in out


def test_editable_with_a_compiler_that_will_not_do(tmp_path: Path) -> None:
    """An old compiler is found out before the build, which does not fail; the sources are used where they lie."""
    source = copy_sources(tmp_path / "fastloss")
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"error: '_Float16' does not name a type\" >&2\nexit 1\n")
    old.chmod(0o755)
    hook = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"  # what `pip install -e` calls
    env = {**os.environ, "CXX": str(old), "FASTLOSS_CUDA": "0"}
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-c", hook, tmp_path], cwd=source, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "'_Float16' does not name a type" in done.stderr, done.stderr
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    assert not list(source.rglob("_C*.so"))
    finder = next(site.glob("__editable__*finder.py")).read_text()  # maps the packages to where the sources lie
    assert str(source / "python" / "fastloss") in finder and str(source / "triton_kernels") in finder


def test_setup_tries_the_compilers_first(tmp_path: Path) -> None:
    """What nvcc refuses is left out, unless it was asked for by name."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho \"nvcc fatal : Unsupported gpu architecture 'compute_90'\"\nexit 1\n")
    nvcc.chmod(0o755)
    code = "import runpy, sys; sys.argv[1:] = ['--name']; print(runpy.run_path('setup.py')['compiles_cuda']())"
    env = {k: v for k, v in os.environ.items() if k != "FASTLOSS_CUDA"} | {"FASTLOSS_NVCC": str(nvcc)}
    for forced, code_wanted in ((None, 0), ("1", 1)):
        more = {} if forced is None else {"FASTLOSS_CUDA": forced}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env | more)
        assert run.returncode == code_wanted and "compute_90" in run.stderr, run.stderr


def test_import_is_lean() -> None:
    heavy = ("triton", "matplotlib", "rich", "transformers", "torch._dynamo")
    loaded = python(f"import sys, fastloss; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == python(f"import sys, torch; print([m for m in {heavy} if m in sys.modules])")


def test_typed() -> None:
    assert (ROOT / "python" / "fastloss" / "py.typed").exists()
