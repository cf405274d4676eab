"""nvcc compiles every csrc/cuda/*.cu for each generation of GPU without a warning, a spill or a stack frame."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))
def test_compiles_without_spills(source: str, tmp_path: Path) -> None:
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    flags = "-O3 -std=c++17 -Werror all-warnings -Xptxas -v -Xcompiler -Wall -t 2".split()
    command = [str(NVCC), *flags, *archs, f"-I{CSRC}", "-c", str(CSRC / "cuda" / source), "-o", str(tmp_path / "k.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    kernels = re.findall(r"Used (\d+) registers", text)
    assert len(frames) == len(kernels) and all(f == ("0", "0", "0") for f in frames), text
    if "launch(" in (CSRC / "cuda" / source).read_text():
        assert kernels, f"{source} launches kernels, and none was compiled"
        assert max(map(int, kernels)) <= 128, text  # else a block of 512 threads does not start
