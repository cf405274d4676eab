"""Damaged and hostile files: each is refused or harmless; nothing crashes, hangs, or gives a wrong number under full verify."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloss.lossless import CorruptError, FormatError, load_file, safe_open, save_file, verify_file
from fastloss.lossless.container import canonical_checksum
from lossless_files import GOOD, MIN_BYTES, USER, damage_many, original, same, tensors
from lossless_killed import MOMENTS, NOTHING_YET

pytest.importorskip("safetensors")
HELPERS = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """For scripts among the tests' helpers, on one thread."""
    path = os.pathsep.join(filter(None, (str(HELPERS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_damaged_files(tmp_path: Path) -> None:
    outcomes = damage_many(tmp_path, seed=1, count=600)
    assert not set(outcomes) - set(GOOD), outcomes
    assert outcomes["found"] > 500 and outcomes["spare"] > 5


@pytest.mark.slow
def test_20000_damaged_files(tmp_path: Path) -> None:
    """In processes of their own: a crash fails the batch, a hang its time limit."""
    outcomes: dict[str, int] = {}
    for seed in range(100, 120):
        command = [sys.executable, str(HELPERS / "lossless_files.py"), str(tmp_path), str(seed), "1000"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        for outcome, count in json.loads(done.stdout).items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    print(outcomes)
    assert sum(outcomes.values()) == 20000 and not set(outcomes) - set(GOOD), outcomes


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], seal: bool = True) -> None:
    """Let `change` alter (header, index) of a file; `seal`: with a right checksum, as a hostile writer would."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header["__metadata__"]
    index = json.loads(metadata["fastloss.tensors"])
    change(header, index)
    metadata["fastloss.tensors"] = index if isinstance(index, str) else json.dumps(index)
    if seal:
        stored = [(k, v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"]
        others = {k: v for k, v in metadata.items() if k != "fastloss.crc32c"}
        metadata["fastloss.crc32c"] = str(canonical_checksum(stored, others))
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[start:])


def set_field(name: str, field: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], index: dict[str, Any]) -> None:
        index[name][field] = value

    return change


def cycle(header: dict[str, Any], index: dict[str, Any]) -> None:
    index["tied"]["same_as"], index["equal"]["same_as"] = "equal", "tied"


def to_itself(header: dict[str, Any], index: dict[str, Any]) -> None:
    index["tied"]["same_as"] = "tied"


def not_stored(header: dict[str, Any], index: dict[str, Any]) -> None:
    index["ghost"] = {"dtype": "float32", "shape": [1], "codec": "plain", "crc32c": 0}


def twice(header: dict[str, Any], index: dict[str, Any]) -> None:
    index["second"] = {**index["w.bf16"]}


def unknown_tensor(header: dict[str, Any], index: dict[str, Any]) -> None:
    del index["ids"]


def swapped_blobs(header: dict[str, Any], index: dict[str, Any]) -> None:
    a, b = index["w.bf16"], index["w.fp16"]
    a["stored"], b["stored"] = b["stored"], a["stored"]


def overlapping(header: dict[str, Any], index: dict[str, Any]) -> None:
    header["bias"]["data_offsets"] = header["ids"]["data_offsets"]


HOSTILE = {
    "same_as cycle": cycle,
    "same_as itself": to_itself,
    "same_as nothing": set_field("tied", "same_as", "nothing"),
    "same_as a number": set_field("tied", "same_as", 7),
    "same_as another shape": set_field("tied", "same_as", "bias"),
    "a name that is not stored": not_stored,
    "one blob for two tensors": twice,
    "a stored tensor without an entry": unknown_tensor,
    "blobs of each other": swapped_blobs,
    "overlapping offsets": overlapping,
    "another dtype than the blob": set_field("w.bf16", "dtype", "float16"),
    "another shape than the blob": set_field("w.bf16", "shape", [30, 50]),
    "another codec than the blob": set_field("w.bf16", "codec", "p7"),
    "a plain tensor said to be a blob": set_field("ids", "codec", "r8"),
    "a blob said to be plain": set_field("w.bf16", "codec", "plain"),
    "another dtype than the plain tensor": set_field("bias", "dtype", "int32"),
    "another shape than the plain tensor": set_field("bias", "shape", [3, 11]),
    "the checksum of others": set_field("w.bf16", "crc32c", 1),
    "the checksum of other plain numbers": set_field("bias", "crc32c", 1),
    "no checksum": set_field("bias", "crc32c", None),
    "a checksum of many bits": set_field("bias", "crc32c", 2**40),
    "an unknown dtype": set_field("bias", "dtype", "float4"),
    "an unknown codec": set_field("bias", "codec", "zip"),
    "an unknown field": set_field("bias", "color", "red"),
    "a shape of words": set_field("bias", "shape", ["33"]),
    "a shape of truth": set_field("scalar", "shape", [True]),
    "a shape below zero": set_field("bias", "shape", [-33, -1]),
    "a shape beyond memory": set_field("bias", "shape", [2**61, 2**61]),
    "a shape beyond memory of nothing": set_field("empty", "shape", [0, 2**61, 2**61]),
    "a thousand dimensions": set_field("bias", "shape", [1] * 1000),
    "an entry that is no object": lambda header, index: index.update(bias=[1]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that is right, though its header is written another way."""
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    save_file(tensors(), path, USER, min_bytes=MIN_BYTES)
    rewritten(path, lambda header, index: None)
    verify_file(path)
    return path.read_bytes()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index(tmp_path: Path, whole: bytes, case: str) -> None:
    """Contradictions of a writer who knows the format: the file is refused although its checksum is right."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    rewritten(path, HOSTILE[case])
    with pytest.raises(CorruptError):
        load_file(path)
    with pytest.raises(CorruptError):
        verify_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", "{", '{"bias":1}', "[" * 100000, '{"a":' * 100000, '{"w":{"shape":[' + "9" * 100000 + "]}}",
        '{"bias":{},"bias":{}}', "\\ud800", '{"\\ud800":{"dtype":"float32","shape":[],"codec":"plain","crc32c":0}}',
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_json_bombs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"bias": torch.ones(3)}, path, USER)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header["__metadata__"]
    metadata["fastloss.tensors"] = text
    others = {k: v for k, v in metadata.items() if k != "fastloss.crc32c"}
    metadata["fastloss.crc32c"] = str(canonical_checksum([("bias", "F32", [3])], others))
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[start:])
    began = time.perf_counter()
    with pytest.raises(CorruptError):
        load_file(path)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 8, b"\xff" * 8, b"\xff" * 100, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        (10**6).to_bytes(8, "little") + b"[" * 10**6, b"PK\3\4" + b"\0" * 60, (2).to_bytes(8, "little") + b"{}" + b"\0",
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"damaged, or no \.safetensors file"):
        load_file(path)


def test_a_blob_that_is_none(tmp_path: Path) -> None:
    """Bytes that the index calls a blob: the error has the tensor's name, whatever is wrong with them."""
    path = tmp_path / "x.safetensors"
    save_file({"w": tensors()["w.bf16"], "b": torch.ones(1)}, path, min_bytes=MIN_BYTES)
    data = path.read_bytes()
    at = data.index(b"FLZ1")
    for damage, error in ((b"ZIP1", FormatError), (b"FLZ1\2", FormatError), (b"FLZ1\1\0\7", CorruptError)):
        path.write_bytes(data[:at] + damage + data[at + len(damage) :])
        with safe_open(path) as file:
            assert torch.equal(file.get_tensor("b"), torch.ones(1))
            with pytest.raises(error, match="tensor 'w'"):
                file.get_tensor("w")
            with pytest.raises(error, match="tensor 'w'"):
                file.get_slice("w")


def test_every_byte_of_a_header_means_something(tmp_path: Path) -> None:
    """A bit or two of each byte of header and metadata, one after the other, under verify="header"."""
    saved = {"w": torch.arange(3), "b": torch.ones(2)}
    path = tmp_path / "x.safetensors"
    save_file(saved, path, {"note": "x"})
    data = bytearray(path.read_bytes())
    for bit in range(0, 8 * (8 + int.from_bytes(data[:8], "little")), 5):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises((CorruptError, FormatError)):
            load_file(path, verify="header")
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert same(load_file(path, verify="header"), saved)


def test_an_absurd_file_costs_no_memory(tmp_path: Path) -> None:
    """What a file announces is held against its size before anything is allocated."""
    file = original(tmp_path, "storage", 0, ("w.bf16", "ids"))
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.data)
    rewritten(path, set_field("w.bf16", "shape", [2**40, 2**10]))
    before = path.stat().st_size
    with pytest.raises(CorruptError):
        load_file(path, verify="off")
    assert before < 20000


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What writers that were killed at chosen moments left behind."""
    command = [sys.executable, str(HELPERS / "lossless_killed.py"), str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is of POSIX systems")
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_while_saving(killed: dict[str, Any], moment: str, has_old: bool) -> None:
    """The old file or none; the temporary file is the living writer's, and goes when the next one writes that name."""
    result = killed[f"{moment} {has_old}"]
    assert result["reached"] == "now" and result["old"] == (True if has_old else None)
    assert result["kept"] and len(result["left"]) == (moment not in NOTHING_YET)
    assert result["new"] and result["names"] == ["x.safetensors", "y.safetensors"]


def test_a_living_writer_keeps_its_file(tmp_path: Path) -> None:
    """Two at once: the one does not clean up the other's temporary file, and the last to end has the name."""
    path = tmp_path / "x.safetensors"

    calls = []

    def meanwhile(name: str, count: int) -> None:
        calls.append(name)
        if len(calls) == 2:  # it is written, and being read back
            save_file({"a": torch.zeros(3)}, path)

    save_file({"a": torch.ones(3)}, path, verify=True, progress=meanwhile)
    assert len(calls) == 2
    assert same(load_file(path), {"a": torch.ones(3)}) and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
