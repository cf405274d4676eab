"""nvcc compiles every csrc/cuda/*.cu for each generation of GPU without a warning, a spill or a stack frame.

And products of bits are what they should be: one instruction of the tensor cores for bits where there are some.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")


FOLDER = tempfile.TemporaryDirectory(prefix="fastloss-cuda-")
#: Threads of the largest block: 65,536 registers are to do for it.
THREADS = {"bgemm.cu": 256, "hamming_topk.cu": 256}
#: BMMA in a step of 512 bits of a warp's tile: (WM / 16) (WN / 8) 2; IMMA: 8 for each, in two rounds.
TILES = {"64, 64": 16, "128, 128": 64, "256, 128": 64, "128, 64": 32}


@functools.cache
def compiled(source: str) -> tuple[Path, str]:
    """(the object, what nvcc said)"""
    out = Path(FOLDER.name) / f"{source}.o"
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    flags = "-O3 -std=c++17 -Werror all-warnings -Xptxas -v -Xcompiler -Wall -t 2".split()
    command = [str(NVCC), *flags, *archs, f"-I{CSRC}", "-c", str(CSRC / "cuda" / source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))
def test_compiles_without_spills(source: str) -> None:
    _, text = compiled(source)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    kernels = re.findall(r"Used (\d+) registers", text)
    assert len(frames) == len(kernels) and all(f == ("0", "0", "0") for f in frames), text
    if "launch(" in (CSRC / "cuda" / source).read_text():
        assert kernels, f"{source} launches kernels, and none was compiled"
        most = min(255, (1 << 16) // THREADS.get(source, 512))
        assert max(map(int, kernels)) <= most, text  # else the largest block does not start


def disassembler() -> tuple[str, str] | None:
    """(cuobjdump, nvdisasm) of the toolkit, or of the triton wheel."""
    spec = importlib.util.find_spec("triton")
    folder = f"{Path(spec.origin).parent}/backends/nvidia/bin" if spec and spec.origin else None
    found = [shutil.which(tool) or shutil.which(tool, path=folder) for tool in ("cuobjdump", "nvdisasm")]
    return (found[0], found[1]) if found[0] and found[1] else None


def kernels_of(source: str) -> dict[tuple[int, bool, str], list[tuple[int, str]]]:
    """SASS of every kernel on tiles: (architecture, by int8, tile) -> (address, instruction)."""
    tools = disassembler()
    assert tools is not None
    command = [tools[0], "-sass", str(compiled(source)[0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"(?=\barch = sm_)", text):
        arch = re.match(r"arch = sm_(\d+)", part)
        for function in part.split("Function : ")[1:]:
            if tile := re.search(r"BitTileILb(\d)ELi(\d+)ELi(\d+)E", function):
                code = [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", function)]
                found[int(arch[1]) if arch else 0, tile[1] == "1", f"{tile[2]}, {tile[3]}"] = code
    return found


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="needs nvcc, cuobjdump and nvdisasm")
@pytest.mark.parametrize("source", ["bgemm.cu", "hamming_topk.cu"])
def test_products_of_bits_are_one_instruction(source: str) -> None:
    """sm_80, sm_90: one BMMA for each tile step, all in one loop. sm_100: none, nor what would emulate it."""
    kernels = kernels_of(source)
    assert len(kernels) == 3 * (6 if source == "bgemm.cu" else 2)
    for (arch, int8, tile), code in kernels.items():
        name = f"sm_{arch} {'int8' if int8 else 'bits'} {tile}"
        tensor = [(at, i) for at, i in code if re.search(r"\b(BMMA|IMMA|BGMMA|IGMMA)\b", i)]
        if not int8 and arch >= 100:
            assert not tensor, name
            continue
        wanted = r"IMMA\.16832\.S8\.S8" if int8 else r"BMMA\.168256\.AND\.POPC"
        assert all(re.search(wanted, i) for _, i in tensor), name
        assert len(tensor) == TILES[tile] * (4 if int8 else 1), name
        # the loop around them: the first branch behind the last of them that goes back before the first
        ends = [
            at
            for at, i in code
            if (to := re.search(r"BRA\S* .*0x([0-9a-f]+)", i)) and int(to[1], 16) <= tensor[0][0] < tensor[-1][0] < at
        ]
        assert ends, f"{name}: not in a loop"
        loop = [i for at, i in code if tensor[0][0] <= at <= min(ends)]
        assert len(loop) < 5 * len(tensor) + 64, f"{name}: {len(loop)} instructions"
