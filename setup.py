"""Build fastloss._C with ninja. torch is neither imported nor linked; the CUDA part is built when nvcc is there.

FASTLOSS_CUDA=0|1 forces the CUDA part off or on; FASTLOSS_CUDA_ARCHS="80;90" names its targets (the last one also as PTX);
FASTLOSS_NVCC and CXX name the compilers; VERBOSE=1 shows the commands. Without a C++ compiler the package installs as pure
Python, and `python -m fastloss.info` says what is missing.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
NVCC = os.environ.get("FASTLOSS_NVCC") or shutil.which("nvcc")
CUDA = os.environ.get("FASTLOSS_CUDA", "1" if NVCC else "0") == "1"
ARCHS = os.environ.get("FASTLOSS_CUDA_ARCHS", "80;90").split(";")


def cuda_home() -> Path:
    """The toolkit that NVCC belongs to, as nvcc itself reports it (nvcc may be a wrapper script)."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    probe = subprocess.run([str(NVCC), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in probe.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path("/usr/local/cuda")


def compression() -> str:
    """The device code is most of the wheel: nvcc 12.8 and later pack it tighter."""
    listed = subprocess.run([str(NVCC), "--help"], capture_output=True, text=True).stdout if NVCC else ""
    return "--compress-mode=size" if "compress-mode" in listed else "-Xfatbin -compress-all"


def ninja_file(out: Path) -> str:
    """The whole build: one rule a compiler, one line a source file."""
    include = " ".join(f"-I{p}" for p in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")))
    common = "-O3 -std=c++17 -ffp-contract=off" + (" -DFASTLOSS_CUDA" if CUDA else "")
    archs = f" -DFASTLOSS_ARCHS='\"{';'.join(ARCHS)}\"'" if CUDA else ""
    targets = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS)
    ptx = f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"
    lines = [
        f"cxxflags = {common}{archs} -fPIC -fopenmp -fvisibility=hidden -ffunction-sections -Wall -Wextra {include}",
        f"nvflags = -DFASTLOSS_CUDA -O3 -std=c++17 -lineinfo {compression() if CUDA else ''} "
        f"-Xcompiler -fPIC,-fvisibility=hidden -I{ROOT}/csrc {targets} {ptx}",
        f"rule cxx\n  command = {CXX} $cxxflags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {NVCC} $nvflags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {CXX} -shared -fopenmp -s -Wl,--gc-sections $in $libs -o $out",
    ]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *(ROOT.glob("csrc/cuda/*.cu") if CUDA else ())]
    objects = []
    for source in sorted(sources):
        name = str(source.relative_to(ROOT / "csrc")).replace("/", "_") + ".o"
        lines.append(f"build {name}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        if source.name == "bindings.cpp":
            lines.append("  cxxflags = $cxxflags -Os")  # nothing there is hot, and templates make it large
        objects.append(name)
    libs = ""
    if CUDA:  # static cudart: one wheel for every torch and every driver
        home = cuda_home()
        found = [
            p for d in ("lib64", "lib", "targets/x86_64-linux/lib") if (p := home / d / "libcudart_static.a").exists()
        ]
        if not found:
            raise SystemExit(f"libcudart_static.a not found under {home}: set CUDA_HOME, or FASTLOSS_CUDA=0")
        libs = f"{found[0]} -ldl -lrt -lpthread"
    lines.append(f"build {out}: link {' '.join(objects)}\n  libs = {libs}\ndefault {out}")
    return "\n".join(lines) + "\n"


class BuildNinja(build_ext):
    """build_ext that writes build.ninja and runs ninja."""

    def build_extension(self, ext: Extension) -> None:
        if CXX is None:
            print("fastloss: no C++ compiler found; installing without compiled kernels", file=sys.stderr)
            return
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(out))
        verbose = ["-v"] if os.environ.get("VERBOSE") else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(work), *verbose])

    def get_outputs(self) -> list[str]:
        return [] if CXX is None else super().get_outputs()

    def copy_extensions_to_source(self) -> None:
        if CXX is not None:
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("fastloss._C", [])], cmdclass={"build_ext": BuildNinja})
