"""Builds a .cu for the host, plain or with a sanitizer, once for every content of its sources."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent
FLAGS = {
    "plain": ["-O2"],
    "quick": ["-O0"],  # to build, not to run
    "asan": ["-O1", "-g", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}
CACHE = ROOT / "build" / "cuda_host"  # the tree's own: a folder that others can write to could hold any library

#: `only="bits"`: these kernels, and bits_capi.cpp.
_LOSSLESS = ("p7_decode", "p7_rows", "r8_decode", "crc32c", "p7_encode", "r8_encode")
GROUPS = {
    "bits": ("bgemm", "hamming_topk"),
    "lossless": _LOSSLESS,
    "lossless_passes": _LOSSLESS,
}

Patch = tuple[str, str, str]
"""A file of csrc/cuda, a text that stands in it exactly once, and what replaces it."""


@functools.cache
def cuda_headers() -> list[str]:
    """Flags for the CUDA headers: a toolkit's, or those in the triton wheel (they lack <nv/target>); empty without either."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return ["-isystem", f"{home}/include"]
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return []
    return ["-isystem", f"{Path(spec.origin).parent}/backends/nvidia/include", "-isystem", f"{CUDA}/host/no_cccl"]


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if not cuda_headers():
        return "no CUDA headers: neither a toolkit nor triton is installed"
    return None


def sources(patches: Sequence[Patch] = ()) -> dict[str, str]:
    """The files of csrc/cuda and what they include, with the patches applied."""
    files = [p for pattern in ("*.cu", "*.cuh", "*.h", "host/*.h") for p in CUDA.glob(pattern)]
    texts = {str(p.relative_to(CUDA)): p.read_text() for p in sorted(files)}
    texts |= {p.name: p.read_text() for p in sorted(CUDA.parent.glob("*.h"))}
    for name, old, new in patches:
        if texts[name].count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands there {texts[name].count(old)} times, not once")
        texts[name] = texts[name].replace(old, new)
    return texts


def build(
    variant: str = "plain", patches: Sequence[Patch] = (), program: str | None = None, only: str | None = None
) -> Path:
    """The shared library of the kernels (`only`: a kernel file, or one of GROUPS) and capi.cpp, or an executable of `program`."""
    texts = sources(patches)
    own = HERE / f"{only}_capi.cpp"
    capi = own.name if own.exists() else "capi.cpp"
    texts["capi.cpp"] = (HERE / capi).read_text() if program is None else program
    if only == "lossless_passes":
        texts["lossless_capi.cpp"] = (HERE / "lossless_capi.cpp").read_text()
    key = hashlib.sha256(repr((variant, FLAGS[variant], texts, only)).encode()).hexdigest()[:20]
    out = CACHE / f"{key}.{'so' if program is None else 'exe'}"
    if out.exists():
        return out
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        for name, text in texts.items():
            path = Path(work) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        made = Path(work) / "made"
        apart = {f"{name}.cu" for group in GROUPS.values() for name in group} | {"device.cu"}
        kernels = [f"{work}/{name}" for name in texts if name.endswith(".cu") and name not in apart]
        if only:
            names = GROUPS.get(only, (only,))
            kernels = [f"-DONLY_{only}", *(f"{work}/{name}.cu" for name in names)]
        kind = ["-fPIC", "-shared", *kernels] if program is None else []
        warnings = "-Wall -Wextra -Wno-unused -Wno-unknown-pragmas".split()
        # Without gnu-unique every library has its own emulator, however many one process loads.
        command = [
            "g++",
            "-std=c++17",
            "-ffp-contract=off",
            "-fno-gnu-unique",
            *warnings,
            *FLAGS[variant],
            f"-I{work}",
            *cuda_headers(),
        ]
        command += ["-x", "c++", *kind, f"{work}/capi.cpp", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        made.replace(out)  # at once: another process may look for it
    return out


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """The library, with the types of what it returns."""
    library = ctypes.CDLL(str(path))
    for name in (
        "c_bgemm",
        "c_dfloat11",
        "c_byte_split",
        "c_byte_histogram",
        "c_byte_split",
        "c_crc32c",
        "c_dfloat11",
        "c_edge_dot",
        "c_edge_sum",
        "c_launch",
        "c_lossless_decode",
        "c_lossless_linear",
        "c_lossless_linear_blob",
        "c_lossless_rows",
        "c_p7_encode",
        "c_p7_histogram",
        "c_p7_pass",
        "c_pointwise",
        "c_r8_encode",
        "c_r8_pass",
        "c_region_stats",
        "c_run",
        "c_sample",
        "c_sample_run",
        "c_scale",
        "c_terms",
        "c_terms_run",
        "c_topk",
        "c_why_not",
    ):
        if hasattr(library, name):  # a library of one kernel has not all
            getattr(library, name).restype = ctypes.c_char_p
    return library


def run_sanitized(
    variant: str, library: Path, *arguments: str, order: str = "asc", module: str = "rows"
) -> tuple[int, str]:
    """Runs `python -m cuda_host.MODULE LIBRARY ARGUMENTS` with the sanitizer's runtime preloaded: python itself has none."""
    found = subprocess.run(["g++", f"-print-file-name=lib{variant}.so"], capture_output=True, text=True, check=True)
    env = {
        **os.environ,
        "LD_PRELOAD": found.stdout.strip(),
        "PYTHONPATH": str(HERE.parent),
        "EMU_ORDER": order,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_thread_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", f"cuda_host.{module}", str(library), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr
