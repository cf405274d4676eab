"""Everything that needs a GPU, in one command of less than ten minutes: `make device-check`, or

    python3 bench/device_check.py [--dry-run] [--only build,tests,pairs,quant,lossless,sanitizer,kernels] [--minutes 9.3]

Needs the system's Python with torch and triton, and downloads nothing; a missing package may lie as a wheel under .whl/.
Builds the extension in place for this GPU, runs the tests marked `gpu`, compute-sanitizer over every kernel, and the
kernels' benchmarks. Every stage has a time limit of its own, and what is known is written as soon as it is known: to $OUT
where that is set, else under bench/results/. The last lines are a short table. Nothing of the GPU's settings is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from device_plan import ROOT, WHEELS, gpu_facts, plan
from device_report import kernel_lines, problems, table

BENCH = ROOT / "bench"
SITE, CARRIED, LOGS = (ROOT / "build" / name for name in ("site", "carried", "sanitizer"))
#: Seconds each stage may take; what one leaves over goes to the benchmarks, which come last.
BUDGET = {"build": 120, "tests": 110, "pairs": 80, "quant": 50, "lossless": 40, "sanitizer": 80, "kernels": 75}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Stage:
    """What became of a stage."""

    verdict: str  # "ok", "failed", "cut" (ran out of time) or "skipped"
    seconds: float = 0.0
    note: str = ""


@dataclass
class Session:
    """The whole run: its environment, its clock and what has been found so far."""

    out: Path
    deadline: float
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def left(self, limit: float = 1e9) -> float:
        return max(1.0, min(limit, self.deadline - time.monotonic()))

    def save(self) -> None:
        """device.json with everything known now; called after each stage, so that a cut run leaves what it had."""
        report = {
            **self.facts,
            "stages": {k: s.__dict__ for k, s in self.stages.items()},
            "kernels": kernel_lines(self.out),
        }
        (self.out / "device.json").write_text(json.dumps(report, indent=1))

    def run(self, command: list[str], log: str, limit: float, **environment: str) -> tuple[int | None, str]:
        """(exit status or None when cut, output). Ctrl-C first, so that pytest still prints its summary."""
        path = self.out / log
        with path.open("a") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            start = path.stat().st_size
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self.environment, **environment},
            )  # fmt: skip
            try:
                status: int | None = process.wait(self.left(limit))
            except subprocess.TimeoutExpired:
                status = None
                for kind, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
                    try:
                        os.killpg(process.pid, kind)
                        process.wait(patience)
                    except (ProcessLookupError, subprocess.TimeoutExpired):
                        continue
        with path.open(errors="replace") as file:
            file.seek(start)
            return status, file.read()


def tail(text: str, lines: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


# ------------------------------------------------------------------------------------------------------------- stages


def use_tree(session: Session) -> None:
    """A folder on PYTHONPATH that holds the package as an installation would: links into the tree, nothing installed."""
    package = SITE / "fastloss"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "python" / "fastloss").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    paths = [str(SITE), str(BENCH), *([str(CARRIED)] if WHEELS.exists() else [])]
    session.environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def build(session: Session, limit: float) -> Stage:
    end = time.monotonic() + limit
    if WHEELS.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        wheels = sorted(map(str, WHEELS.glob("*.whl")))
        status, text = session.run([*pip, "--target", str(CARRIED), *wheels], "build.log", 60)
        if status != 0:
            return Stage("failed", note=f"carried wheels: {tail(text, 2)}")
        session.environment["PYTHONPATH"] = os.pathsep.join([str(CARRIED), session.environment.get("PYTHONPATH", "")])
    # Without a GPU (a test of this script) whatever setup.py makes by itself will do.
    settings = {"FASTLOSS_CUDA": "1", "FASTLOSS_CUDA_ARCHS": session.facts["arch"]} if session.facts["arch"] else {}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, text = session.run(command, "build.log", end - time.monotonic(), **settings)
    use_tree(session)
    if status != 0:
        return Stage("cut" if status is None else "failed", note=tail(text))
    _, info = session.run([sys.executable, "-m", "fastloss.info"], "build.log", 30)
    return Stage("ok", note=tail(info, 3))


def run_tests(session: Session, limit: float, log: str, *files: str) -> Stage:
    """These files alone: the others need packages that a bare GPU image lacks."""
    use_tree(session)
    command = [sys.executable, "-m", "pytest", "-q", *files, "-p", "no:cacheprovider", "--durations=5"]
    status, text = session.run(command, log, limit, FASTLOSS_GPU_STRICT="1")
    counts = r"\d+ (passed|failed|skipped|error|deselected)"
    summary = next((line.strip("= ") for line in reversed(text.splitlines()) if re.search(counts, line)), tail(text, 2))
    if status is None:
        return Stage("cut", note=summary)
    # what was skipped was not checked: a GPU or a backend was not there
    return Stage("ok" if status == 0 and "skipped" not in summary else "failed", note=summary)


def tests(session: Session, limit: float) -> Stage:
    return run_tests(session, limit, "tests.log", "tests/test_gpu.py", "tests/test_gpu_pointwise.py")


def pairs(session: Session, limit: float) -> Stage:
    return run_tests(session, limit, "pairs.log", "tests/test_gpu_pairs.py")


def quant(session: Session, limit: float) -> Stage:
    return run_tests(session, limit, "quant.log", "tests/test_gpu_quant.py")


def lossless(session: Session, limit: float) -> Stage:
    return run_tests(session, limit, "lossless.log", "tests/test_gpu_lossless.py")


def sanitizer(session: Session, limit: float) -> Stage:
    """The four tools at once, each in a process of its own."""
    use_tree(session)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return Stage("skipped", note="compute-sanitizer is not installed")
    LOGS.mkdir(parents=True, exist_ok=True)
    running = {}
    environment = {**session.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--target-processes",
            "application-only",
            sys.executable,
        ]
        command += [str(BENCH / "sanitize.py"), *(["--rows-only"] if name == "initcheck" else [])]
        log = (LOGS / name).open("w")
        running[name] = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    end = time.monotonic() + session.left(limit)
    notes, verdict = [], "ok"
    for name, process in running.items():
        try:
            status: int | None = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = (LOGS / name).read_text(errors="replace")
        with (session.out / "sanitizer.log").open(
            "a"
        ) as log:  # few files come back from a lent machine: one for all four
            log.write(f"===== {name}\n{text[:2_000_000]}\n")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        done = "sanitize:" in text
        notes.append(f"{name}: {'cut' if status is None else summary[-1] if summary else tail(text, 1)}"[:120])
        if status is None:
            verdict = "cut" if verdict == "ok" else verdict
        elif status != 0 or not done:
            verdict = "failed"
    return Stage(verdict, note="; ".join(notes))


def kernels(session: Session, limit: float) -> Stage:
    """device_kernels.py; after a kernel that takes the CUDA context down, a new process goes on with the next case."""
    use_tree(session)
    out, end = session.out / "kernels.jsonl", time.monotonic() + session.left(limit)
    out.unlink(missing_ok=True)
    start, broken = 0, 0
    tiny = ["--tiny"] if session.facts["gpu"] is None else []
    while True:
        seconds = end - time.monotonic()
        if seconds < 5:
            return Stage("cut", note=f"{start} cases; {broken} broke off")
        deadline = time.time() + seconds - 20
        command = [sys.executable, str(BENCH / "device_kernels.py"), "--out", str(out), "--start", str(start), *tiny]
        status, text = session.run([*command, "--deadline", str(deadline)], "kernels.log", seconds)
        begun = [line["started"] for line in kernel_lines(session.out) if "started" in line]
        if status == 0:
            wrong = problems(kernel_lines(session.out))
            verdict = "failed" if broken or wrong else "ok"
            return Stage(verdict, note="; ".join([f"{len(begun)} cases", f"{broken} broke off", *wrong]))
        broken += 1
        if not begun or begun[-1] + 1 == start:  # it never got to a case
            return Stage("failed", note=tail(text))
        start = begun[-1] + 1


STAGES: dict[str, Callable[[Session, float], Stage]] = {
    "build": build, "tests": tests, "pairs": pairs, "quant": quant, "lossless": lossless,
    "sanitizer": sanitizer, "kernels": kernels,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ plan, report


def summary(session: Session) -> str:
    stages = [
        f"{k:10s} {s.verdict:8s} {s.seconds:5.0f} s  {' | '.join(s.note.splitlines())}"
        for k, s in session.stages.items()
    ]
    return "\n".join([table(session.out), "", *stages, f"written to {session.out}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing; run nothing")
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run, with commas")
    parser.add_argument("--minutes", type=float, default=9.3, help="end before this")
    parser.add_argument(
        "--without-gpu", action="store_true", help="run on the CPU with tiny shapes: a test of this script"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in STAGES]:
        parser.error(f"no stage {unknown[0]!r}: one of {', '.join(STAGES)}")
    facts = gpu_facts()
    print(plan(facts, {name: BUDGET[name] for name in chosen}, options.minutes), flush=True)
    if options.dry_run:
        return 0
    if facts["gpu"] is None and not options.without_gpu:
        print("no CUDA device is visible to torch: nothing was run")
        return 1
    label = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "no-gpu").lower())
    default = BENCH / "results" / label / f"device-{facts['date']}-{facts['commit']}"
    out = Path(os.environ.get("OUT") or default)
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out, started + 60 * options.minutes, facts, environment={**os.environ, "PYTHONUNBUFFERED": "1"})
    for name in chosen:
        begin = time.monotonic()
        rest = sum(BUDGET[later] for later in chosen[chosen.index(name) + 1 :])
        limit = session.left() - rest if name == chosen[-1] else min(BUDGET[name], session.left() - rest)
        try:
            stage = STAGES[name](session, max(5.0, limit))
        except Exception as error:  # the later stages and the results so far are worth more than a clean traceback
            stage = Stage("failed", note=f"{type(error).__name__}: {error}")
        stage.seconds = round(time.monotonic() - begin, 1)
        session.stages[name] = stage
        print(f"{name}: {stage.verdict} in {stage.seconds} s", flush=True)
        session.save()
    print(summary(session))
    return int(any(s.verdict != "ok" for s in session.stages.values()))


if __name__ == "__main__":
    sys.exit(main())
