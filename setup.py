"""Build fastloss._C with ninja. torch is neither imported nor linked; the CUDA part is built when nvcc is there.

FASTLOSS_CUDA=0|1 forces the CUDA part off or on; FASTLOSS_CUDA_ARCHS="80;90" names its targets (the last one also as PTX);
FASTLOSS_NVCC and CXX name the compilers; VERBOSE=1 shows the commands; FASTLOSS_LINEINFO=1 keeps source lines for
profilers, which doubles the device code. Each compiler is tried first. Without a C++ compiler
that will do, the package installs as pure Python, and `python -m fastloss.info` says what is missing; without an nvcc that
will do, it is built for the CPU alone, or not at all where FASTLOSS_CUDA=1 asks for CUDA.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
NVCC = os.environ.get("FASTLOSS_NVCC") or shutil.which("nvcc")
ARCHS = os.environ.get("FASTLOSS_CUDA_ARCHS", "80;90").split(";")
TARGETS = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS)


def refusal(command: str, file: str, source: str) -> str | None:
    """Why `command` cannot compile `source`, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_text(source)
        probe = [*shlex.split(command), str(path), "-o", f"{path}.o"]
        try:
            run = subprocess.run(probe, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return str(error)
    said = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
    reason = next((line for line in said if "error" in line or "fatal" in line), said[-1] if said else "no message")
    return f"{probe[0]}: {reason}" if run.returncode else None


@functools.cache
def compiles() -> bool:
    """Whether CXX can build the CPU part: it has Python's headers, OpenMP and _Float16 (GCC 12 on x86)."""
    reason: str | None = "no C++ compiler found"
    if CXX is not None:
        flags = f"-std=c++17 -fPIC -fopenmp -I{shlex.quote(sysconfig.get_path('include'))} -c"
        reason = refusal(f"{CXX} {flags}", "probe.cpp", "#include <Python.h>\n_Float16 half = 1;\n")
    if reason:
        print(f"fastloss: installing without compiled kernels: {reason}", file=sys.stderr)
    return reason is None


@functools.cache
def compiles_cuda() -> bool:
    """Whether to build the CUDA part: nvcc knows every target, and the toolkit has the static runtime."""
    asked = os.environ.get("FASTLOSS_CUDA")
    if asked != "1" and (asked is not None or NVCC is None):
        return False
    reason = refusal(f"{NVCC or 'nvcc'} -std=c++17 {TARGETS} -c", "probe.cu", "__global__ void nothing() {}\n")
    if reason is None and cudart() is None:
        reason = f"libcudart_static.a not found under {cuda_home()}: set CUDA_HOME"
    if reason and asked == "1":
        raise SystemExit(f"fastloss: FASTLOSS_CUDA=1, but {reason}")
    if reason:
        print(f"fastloss: building without CUDA: {reason}", file=sys.stderr)
    return reason is None


def cuda_home() -> Path:
    """The toolkit that NVCC belongs to, as nvcc itself reports it (nvcc may be a wrapper script)."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    probe = subprocess.run([str(NVCC), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in probe.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path("/usr/local/cuda")


def cudart() -> Path | None:
    """The static CUDA runtime: one wheel for every torch and every driver."""
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return next((p for d in folders if (p := cuda_home() / d / "libcudart_static.a").exists()), None)


def compression() -> str:
    """The device code is most of the wheel: nvcc 12.8 and later pack it tighter."""
    listed = subprocess.run([str(NVCC), "--help"], capture_output=True, text=True).stdout
    return "--compress-mode=size" if "compress-mode" in listed else "-Xfatbin -compress-all"


def ninja_file(out: Path) -> str:
    """The whole build: one rule a compiler, one line a source file."""
    cuda = compiles_cuda()
    include = " ".join(f"-I{p}" for p in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")))
    common = "-O3 -std=c++17 -ffp-contract=off" + (" -DFASTLOSS_CUDA" if cuda else "")
    archs = f" -DFASTLOSS_ARCHS='\"{';'.join(ARCHS)}\"'" if cuda else ""
    ptx = f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"
    # Where it is not Linux (macOS), Python's symbols must be allowed to stay open.
    link = "-s -Wl,--gc-sections" if sys.platform == "linux" else "-undefined dynamic_lookup"
    lineinfo = "-lineinfo " if os.environ.get("FASTLOSS_LINEINFO") == "1" else ""
    lines = [
        f"cxxflags = {common}{archs} -fPIC -fopenmp -fvisibility=hidden -ffunction-sections -Wall -Wextra {include}",
        f"nvflags = -DFASTLOSS_CUDA -O3 -std=c++17 {lineinfo}{compression() if cuda else ''} "
        f"-Xcompiler -fPIC,-fvisibility=hidden -I{ROOT}/csrc {TARGETS} {ptx}",
        f"rule cxx\n  command = {CXX} $cxxflags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {NVCC} $nvflags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {CXX} -shared -fopenmp {link} $in $libs -o $out",
    ]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *(ROOT.glob("csrc/cuda/*.cu") if cuda else ())]
    objects = []
    for source in sorted(sources):
        name = str(source.relative_to(ROOT / "csrc")).replace("/", "_") + ".o"
        lines.append(f"build {name}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        if source.name.startswith("bindings"):
            lines.append("  cxxflags = $cxxflags -Os")  # nothing there is hot, and templates make it large
        objects.append(name)
    libs = f"{cudart()} -ldl -lrt -lpthread" if cuda else ""
    lines.append(f"build {out}: link {' '.join(objects)}\n  libs = {libs}\ndefault {out}")
    return "\n".join(lines) + "\n"


class BuildNinja(build_ext):
    """build_ext that writes build.ninja and runs ninja."""

    def build_extension(self, ext: Extension) -> None:
        if not compiles():
            return
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(out))
        verbose = ["-v"] if os.environ.get("VERBOSE") else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(work), *verbose])

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if compiles() else []

    def copy_extensions_to_source(self) -> None:
        if compiles():
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("fastloss._C", [])], cmdclass={"build_ext": BuildNinja})
