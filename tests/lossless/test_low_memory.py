"""`save_file(low_memory=True)` and `pack`: the same file, one tensor in memory at a time, nothing left beside it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss.lossless import CorruptError, compress, load_file, safe_open, save_file
from fastloss.lossless import safe_open as safe_open_class
from fastloss.lossless.pack import pack
from fastloss.lossless.spill import Spill
from lossless_files import MIN_BYTES, USER, same, tensors

pytest.importorskip("safetensors")
from safetensors.torch import save_file as save_plain

WAYS = [{}, {"tier": "fused", "workers": 3}, {"codec": "raw", "verify": True}, {"verify": True, "workers": 2}]


class Made(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for; `most` of them lived at once."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]) -> None:
        self.makers, self.alive, self.most, self.asked = makers, 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        made = self.makers[name]()
        weakref.finalize(made, self._gone)
        self.alive, self.asked = self.alive + 1, self.asked + 1
        self.most = max(self.most, self.alive)
        return made

    def _gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@pytest.mark.parametrize("ways", WAYS)
def test_the_same_file(tmp_path: Path, ways: dict[str, Any]) -> None:
    """Tied, equal, odd and empty ones, and blobs."""
    saved = {**tensors(), "blob": compress(torch.randn(40, 50).bfloat16())}
    saved["the same blob"] = saved["blob"]
    for low_memory in (False, True):
        path = tmp_path / f"{low_memory}.safetensors"
        save_file(saved, path, USER, min_bytes=MIN_BYTES, low_memory=low_memory, **ways)
    assert path.read_bytes() == (tmp_path / "False.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("verify", [False, True])
def test_one_tensor_at_a_time(tmp_path: Path, verify: bool) -> None:
    made = Made({f"{k}": lambda k=k: torch.full((100, 100), float(k)) for k in range(9)})
    save_file(made, tmp_path / "x.safetensors", min_bytes=0, verify=verify, low_memory=True)
    assert made.most == 1 and made.asked == 9 * (1 + verify)
    assert same(load_file(tmp_path / "x.safetensors"), {name: make() for name, make in made.makers.items()})


def test_wrong_tensors_are_found_at_their_turn(tmp_path: Path) -> None:
    made = Made({"a": lambda: torch.ones(3), "b": lambda: torch.ones(3).to_sparse()})
    with pytest.raises(TypeError, match="'b' cannot be stored"):
        save_file(made, tmp_path / "x.safetensors", low_memory=True)
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "x.safetensors")
    for path in (tmp_path / "missing" / "x.safetensors", tmp_path / "link"):
        with pytest.raises(FileNotFoundError, match=r"No such folder.*missing"):
            save_file(made, path, low_memory=True)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """At any byte: the old file stays, and nothing beside it."""
    done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_FULL = """
import resource, signal, sys, torch
from pathlib import Path
from fastloss.lossless import load_file, save_file
folder = Path(sys.argv[1])
path, old = folder / "x.safetensors", {"a": torch.ones(3)}
save_file(old, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
new = {f"{k}": torch.randn(100, 100).bfloat16() for k in range(5)}
for most in (0, 1, 5000, 20000, 50000, 70000):
    for workers, low_memory in ((1, False), (1, True), (3, True)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            save_file(new, path, min_bytes=0, low_memory=low_memory, workers=workers)
            raise SystemExit(f"saved within {most} bytes")
        except OSError as error:
            assert "x.safetensors" in str(error), error
        assert torch.equal(load_file(path)["a"], old["a"]) and len(list(folder.iterdir())) == 1
"""


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """Where files have no names while they are written, and where they do: nothing stays."""
    if named:
        monkeypatch.setattr("tempfile._O_TMPFILE_WORKS", False, raising=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Spill, "keep", full)
    with pytest.raises(OSError, match=r"No space left.*x\.safetensors"):
        save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", low_memory=True)
    assert not list(tmp_path.iterdir())


def test_spill_gives_back_what_it_got(tmp_path: Path) -> None:
    with open(tmp_path / "spill", "w+b") as file:
        spill = Spill(file)
        parts = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 0, 70000, 3)]
        reads = [spill.keep(part) for part in parts]
        for k in (2, 0, 3, 1, 2):
            assert torch.equal(reads[k](), parts[k])
        file.truncate(100)
        with pytest.raises(OSError, match="not there any more"):
            reads[2]()


def test_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened anew now and then: tensors live on, and another file in its place is noticed."""
    monkeypatch.setattr(sys.modules[safe_open_class.__module__], "_FORGET", 100)
    path, saved = tmp_path / "x.safetensors", tensors()
    for save in (save_file, lambda holds, path: save_plain({k: v.clone() for k, v in holds.items()}, path)):
        save(saved, path)
        with safe_open(path) as file:
            first, found = file._file, {}
            for name in file.keys():
                found[name] = file.get_tensor(name)
                file.forget(50)
                assert (file._file is first) == (len(found) == 1)
            assert same(found, saved)
            save_file({"a": torch.ones(3)}, tmp_path / "other")
            os.replace(tmp_path / "other", path)
            with pytest.raises(CorruptError, match="was replaced while it was read"):
                file.forget(200)


_PACK = """
import sys, torch
from pathlib import Path
from fastloss.lossless import compress
from fastloss.lossless.pack import pack
torch.set_num_threads(1)
compress(torch.randn(1000, 1000).bfloat16(), codec="r8").decompress()
def peak():  # not ru_maxrss, which a process has from the one that started it
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
pack(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""
_STATUS = Path("/proc/self/status")
_HAS_PEAK = _STATUS.exists() and "VmHWM" in _STATUS.read_text()  # sandboxes have a /proc without


@pytest.mark.skipif(not _HAS_PEAK, reason="asks the system for the peak of a process's memory")
def test_memory_of_pack(tmp_path: Path) -> None:
    """MiB beyond what the process has anyway: 64 of mapped pages of each file, and a few tensors of 8; not the shard's 320."""
    weights = torch.randn(1024, 4096).bfloat16()
    shard = {f"{k}": weights.roll(k) for k in range(40)}
    save_plain(shard, tmp_path / "shard.safetensors")
    command = [sys.executable, "-c", _PACK, str(tmp_path / "shard.safetensors"), str(tmp_path / "packed.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 240, done.stdout


def test_pack_reads_each_tensor_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, saved = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tensors()
    save_file(saved, source)
    monkeypatch.setattr(sys.modules[safe_open_class.__module__], "_FORGET", 1)
    pack(source, target, workers=2)
    assert same(load_file(target), saved)
