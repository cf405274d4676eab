"""Hostile blobs under AddressSanitizer and UndefinedBehaviorSanitizer: tests/fuzz_lossless.cpp, a short run of it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
UNITS = ("crc32c", "lossless_blocks", "lossless_decode", "lossless_rows", "r8_decode", "r8_decode_bf16")
SOURCES = [ROOT / "tests" / "fuzz_lossless.cpp", *(CPU / f"{name}.cpp" for name in UNITS)]
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="wants g++ and an x86-64 processor"
)


def _run(*command: str, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _key() -> str:
    """Of everything that could be included."""
    files = sorted(
        [SOURCES[0], *ROOT.glob("csrc/*.h"), *(p for p in CPU.iterdir() if p.suffix in (".h", ".inc", ".cpp"))]
    )
    return hashlib.sha256(b"".join(p.read_bytes() for p in files) + repr(FLAGS).encode()).hexdigest()[:20]


@pytest.fixture(scope="module")
def program() -> Path:
    """The harness, built once for every content of its sources, in the tree's own folder."""
    folder = ROOT / "build" / "fuzz"
    out = folder / _key()
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{out.name}.{os.getpid()}.{s.stem}.o" for s in SOURCES]
        with ThreadPoolExecutor(2) as pool:
            builds = [
                pool.submit(_run, "g++", *FLAGS, f"-I{ROOT / 'csrc'}", "-c", str(s), "-o", str(o))
                for s, o in zip(SOURCES, objects, strict=True)
            ]
            for build in builds:
                build.result()
        fresh = folder / f"{out.name}.{os.getpid()}.new"
        _run("g++", *FLAGS, *map(str, objects), "-o", str(fresh))
        fresh.replace(out)
        for o in objects:
            o.unlink()
    return out


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_blobs(program: Path, seed: int) -> None:
    out = _run(str(program), "60", "150", str(seed), OMP_NUM_THREADS="2")
    assert "150 executions" in out
    assert "clean" in out
