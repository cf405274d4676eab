"""Kill writers of files with signal 9 at chosen moments: python lossless_killed.py FOLDER prints what each left behind.

One process that forks its victims, since importing torch takes far longer than saving a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastloss.lossless import container, load_file, save_file
from lossless_files import MIN_BYTES, same, tensors

NOTHING_YET = ("while it is compressed", "while parts wait on the disk")  # without a name
MOMENTS = (
    *NOTHING_YET, "before the first byte", "between two tensors", "before the disk has it", "before its name"
)  # fmt: skip
OLD = {"a": torch.arange(3)}


def _save_until(moment: str, path: Path, stop: Callable[..., Any]) -> None:
    """Save to `path`, and call `stop` at `moment`."""
    if moment == "while it is compressed":
        save_file(tensors(1), path, tier="fused", min_bytes=MIN_BYTES, progress=stop)
    elif moment == "while parts wait on the disk":
        done: list[str] = []
        save_file(
            tensors(1), path, tier="fused", min_bytes=MIN_BYTES, low_memory=True,
            progress=lambda name, count: stop() if len(done) == 5 else done.append(name),
        )  # fmt: skip
    elif moment == "before the first byte":
        container.write = stop
    elif moment == "between two tensors":
        whole_write, whole_bytes, calls = container.write, container.raw_bytes, []

        def counted(tensor: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return stop() if len(calls) == 7 else whole_bytes(tensor)

        def write(*arguments: Any) -> int:
            container.raw_bytes = counted
            return whole_write(*arguments)

        container.write = write
    elif moment == "before the disk has it":
        os.fsync = stop
    else:
        os.replace = stop
    save_file(tensors(1), path, tier="fused", min_bytes=MIN_BYTES)


def killed_at(moment: str, folder: Path, has_old: bool) -> dict[str, Any]:
    """What a writer that is killed leaves, and what the next one makes of it."""
    folder.mkdir()
    path = folder / "x.safetensors"
    if has_old:
        save_file(OLD, path)
    reads, writes = os.pipe()
    child = os.fork()
    if not child:

        def stop(*_: Any) -> Any:
            os.write(writes, b"now")
            time.sleep(60)

        _save_until(moment, path, stop)
        os._exit(0)
    os.close(writes)
    reached = os.read(reads, 3)  # empty where the child ended without reaching the moment
    left = [p.name for p in folder.iterdir() if p.name != path.name]
    save_file({"b": torch.ones(1)}, folder / "y.safetensors")  # another name: none of its business
    kept = [p.name for p in folder.iterdir() if p.name not in ("x.safetensors", "y.safetensors")]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reads)
    result = {
        "reached": reached.decode(),
        "left": left,
        "kept": kept == left,
        "old": same(load_file(path), OLD) if path.exists() else None,
    }
    save_file(tensors(2), path, tier="fused", min_bytes=MIN_BYTES)
    result["new"] = same(load_file(path), tensors(2))
    result["names"] = sorted(p.name for p in folder.iterdir())
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {f"{m} {o}": killed_at(m, Path(sys.argv[1]) / f"{m} {o}", o) for m in MOMENTS for o in (True, False)}
        )
    )
