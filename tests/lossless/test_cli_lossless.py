"""`fastloss pack | unpack | verify | stat`: files and sharded folders there and back, resumed, refused, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastloss import __main__
from fastloss.lossless import load_file, safe_open, verify_file
from fastloss.lossless.progress import ProgressBar
from lossless_cases import normal
from lossless_files import USER, same

pytest.importorskip("safetensors")
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "layer.weight": normal(300 * 200, torch.bfloat16, seed).reshape(300, 200),
        "layer.bias": normal(300, torch.bfloat16, seed),
        "head.weight": normal(200 * 100, torch.float32, seed).reshape(200, 100),
        "position_ids": torch.arange(7) + seed,
    }


def run(*arguments: object) -> int:
    return __main__.main([str(a) for a in arguments])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_plain(model(), path, USER)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer in a folder of its own."""
    folder = tmp_path / "checkpoint"
    (folder / "tokenizer").mkdir(parents=True)
    names, weight_map = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)], {}
    for k, name in enumerate(names):
        part = {f"{k}.{key}": value for key, value in model(k).items()}
        save_plain(part, folder / name, USER)
        weight_map |= dict.fromkeys(part, name)
    size = 2 * sum(v.numel() * v.element_size() for v in model().values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text('{"hidden_size": 200}')
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_file(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, back = single.with_name("model.flz.safetensors"), single.with_name("back.safetensors")
    assert run("pack", single) == 0
    assert str(packed) in capsys.readouterr().out and packed.stat().st_size < 0.85 * single.stat().st_size
    verify_file(packed)
    assert run("verify", packed) == 0 and run("verify", packed, "--against", single) == 0
    assert run("unpack", packed, back) == 0
    assert same(load_plain(back), model())
    assert run("verify", back) == 0 and "ordinary file" in capsys.readouterr().out
    with safe_open(back) as file:
        assert file.metadata() == USER and not file.is_compressed
    assert sorted(p.name for p in single.parent.iterdir()) == [
        "back.safetensors",
        "model.flz.safetensors",
        "model.safetensors",
    ]
    single.unlink()
    assert run("unpack", packed) == 0 and same(load_plain(single), model())


@pytest.mark.parametrize(
    "flags", [("--tier", "fused"), ("--codec", "p7"), ("--codec", "raw"), ("--workers", 2, "--no-verify")]
)
def test_ways_to_pack(single: Path, flags: tuple[object, ...]) -> None:
    packed = single.with_name("x.safetensors")
    assert run("pack", single, packed, "--quiet", *flags) == 0
    want = "plain" if "raw" in flags else "r8" if "--workers" in flags else "p7"
    with safe_open(packed) as file:
        entry = file.entry("layer.weight")
        assert entry is not None and entry.codec == want
    assert same(load_file(packed), model())


def test_cast(single: Path) -> None:
    packed = single.with_name("x.safetensors")
    assert run("pack", single, packed, "--dtype", "float16") == 0
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in model().items()}
    assert same(load_file(packed), rounded)
    assert run("verify", packed, "--against", single) == 1


def test_sharded(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, back = sharded.with_name("checkpoint-flz"), sharded.with_name("back")
    assert run("pack", sharded) == 0
    was, now = contents(sharded), contents(packed)
    assert set(now) == set(was)
    index = json.loads(now["model.safetensors.index.json"])
    assert index["weight_map"] == json.loads(was["model.safetensors.index.json"])["weight_map"]
    assert index["metadata"]["fastloss.flz"] == "1" and index["metadata"]["fastloss.stored_size"] == sum(
        len(data) for name, data in now.items() if name.endswith(".safetensors")
    )
    for name, file in index["weight_map"].items():
        with safe_open(packed / file) as shard:
            assert name in shard.keys()
    assert now["config.json"] == was["config.json"] and now[os.path.join("tokenizer", "vocab.txt")] == b"a\nb\n"
    assert run("verify", packed, "--against", sharded) == 0

    assert run("unpack", packed, back) == 0
    again = contents(back)
    assert set(again) == set(was)
    for name in was:
        if name.endswith(".safetensors"):
            assert same(load_plain(back / name), load_plain(sharded / name))
        else:
            assert again[name] == was[name]

    capsys.readouterr()
    assert run("stat", packed, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total"]["tensors"] == 8 and report["total"]["bytes"] == index["metadata"]["total_size"]
    assert run("pack", sharded, sharded.with_name("half"), "--dtype", "bfloat16") == 0
    half = json.loads((sharded.with_name("half") / "model.safetensors.index.json").read_text())
    assert half["metadata"]["total_size"] == 2 * (2 * (300 * 200 + 300 + 200 * 100) + 8 * 7)


def test_resume(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there and right stays untouched, what a killed pack left goes, what is missing comes."""
    packed = sharded.with_name("checkpoint-flz")
    assert run("pack", sharded) == 0
    first, second = sorted(packed.glob("*.safetensors"))
    before, stamp = contents(packed), first.stat().st_mtime_ns
    second.unlink()
    (packed / f".{second.name}.abc.partial").write_bytes(b"half")
    (packed / "config.json").unlink()
    capsys.readouterr()
    assert run("pack", sharded) == 0
    assert contents(packed) == before and first.stat().st_mtime_ns == stamp
    assert f"{first}: already there" in capsys.readouterr().out


def test_nothing_is_overwritten(single: Path, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = single.with_name("model.flz.safetensors")
    packed.write_bytes(b"something else")
    assert run("pack", single) == 4 and packed.read_bytes() == b"something else"
    assert "--force" in capsys.readouterr().err
    assert run("pack", single, "--force") == 0 and same(load_file(packed), model())
    save_plain(model(1), single)
    assert run("pack", single) == 4
    assert run("unpack", packed) == 4 and same(load_plain(single), model(1))
    assert run("unpack", packed, "--force") == 0 and same(load_plain(single), model())

    target = sharded.with_name("checkpoint-flz")
    assert run("pack", sharded) == 0
    (target / "config.json").write_text("mine")
    assert run("pack", sharded) == 4 and (target / "config.json").read_text() == "mine"
    assert run("pack", sharded, "--force") == 0 and (target / "config.json").read_text() != "mine"


def test_damage(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every damaged tensor of every file is named; a damaged shard is no shard that is already there."""
    packed = sharded.with_name("checkpoint-flz")
    assert run("pack", sharded, "--quiet") == 0
    first, second = sorted(packed.glob("*.safetensors"))
    for file in (first, second):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
    capsys.readouterr()
    assert run("verify", packed) == 1
    out, err = capsys.readouterr()
    assert out == "" and all(f"'{k}.layer.{part}'" in err for k in (0, 1) for part in ("weight", "bias"))
    assert err.count("\n") == 4
    assert run("unpack", packed, sharded.with_name("back")) == 1
    assert not list(sharded.with_name("back").glob("*.safetensors"))
    assert run("pack", sharded) == 4
    assert run("pack", sharded, "--force") == 0 and run("verify", packed) == 0


def test_wrong_commands(
    single: Path, sharded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = single.parent / "empty"
    empty.mkdir()
    for arguments, code in (
        (("pack", single, single), 2),
        (("pack", sharded, sharded / "inside"), 2),
        (("pack", empty), 2),
        (("pack", single, "--workers", 0), 2),
        (("unpack", single), 2),
        (("verify", empty), 2),
        (("pack", sharded, single), 4),
        (("pack", single.with_name("none.safetensors")), 3),
        (("verify", single.with_name("none.safetensors")), 3),
        (("stat", single.with_name("none.safetensors")), 3),
    ):
        assert run(*arguments) == code, arguments
        assert capsys.readouterr().err.startswith("fastloss: ")
    for arguments in (("pack",), ("pack", single, "--tier", "x"), ("pack", single, "--dtype", "int8"), ("zip", single)):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
    index = sharded / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": "no such file"}}'):
        shutil.rmtree(sharded.with_name("checkpoint-flz"), ignore_errors=True)
        index.write_text(text)
        assert run("pack", sharded, "--quiet") in (1, 3)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastloss.lossless.pack.save_file", interrupted)
    assert run("pack", single, single.with_name("y.safetensors")) == 130


def test_stat(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = single.with_name("model.flz.safetensors")
    assert run("pack", single, "--quiet") == 0 and capsys.readouterr().out == ""
    assert run("stat", packed, single) == 0
    out = capsys.readouterr().out
    assert "layer.weight" in out and "300 x 200" in out and "r8" in out and "all files: 8 tensors" in out
    assert run("stat", packed, "--json") == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    rows = {row["name"]: row for row in file["tensors"]}
    assert rows["layer.weight"]["bytes"] == 120000 and rows["layer.weight"]["stored"] < 82000
    assert rows["position_ids"]["codec"] == "plain" and file["total"]["file"] == packed.stat().st_size


def test_a_packed_file_changes_its_tier(single: Path) -> None:
    packed, other = single.with_name("a.safetensors"), single.with_name("b.safetensors")
    assert run("pack", single, packed) == 0 and run("pack", packed, other, "--tier", "fused") == 0
    with safe_open(other) as file:
        entry = file.entry("head.weight")
        assert entry is not None and entry.codec == "p7" and file.metadata() == USER
    assert same(load_file(other), model())


def test_unpacked_is_the_file_that_was_packed(tmp_path: Path) -> None:
    """The package's own order of dtypes and names, and its padding: the hash of a published file is right again."""
    path, packed = tmp_path / "x.safetensors", tmp_path / "x.flz.safetensors"
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    small = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
    whole = (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
    tensors = {f"{k} of {dtype}": torch.ones(3 + k).to(dtype) for k in (2, 1) for dtype in (*floats, *small, *whole)}
    tensors |= model() | {"é": torch.ones(1), "Z": torch.ones(2)}
    save_plain(tensors, path, {"format": "pt"})
    original = path.read_bytes()
    assert run("pack", path) == 0
    path.unlink()
    assert run("unpack", packed) == 0 and path.read_bytes() == original


@pytest.mark.parametrize("has_rich", [True, False])
def test_progress_bar(single: Path, monkeypatch: pytest.MonkeyPatch, has_rich: bool) -> None:
    """With a terminal: rich's bar where it is installed, moved by every byte twice (packed, read back); else none."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    moved: list[tuple[str, int]] = []
    whole = ProgressBar.advance

    def advance(bar: ProgressBar, name: str, count: int) -> None:
        assert (bar._bar is not None) == has_rich
        whole(bar, name, count)
        moved.append((name, count))

    monkeypatch.setattr(ProgressBar, "advance", advance)
    assert (
        run("pack", single) == 0
        and run("unpack", single.with_name("model.flz.safetensors"), single.with_name("b")) == 0
    )
    assert sum(count for _, count in moved) == 3 * sum(v.numel() * v.element_size() for v in model().values())
