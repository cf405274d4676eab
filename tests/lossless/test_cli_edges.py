"""`fastloss pack | unpack` where something is there already that looks nearly right, or a link leads nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastloss import __main__
from fastloss.lossless import safe_open
from lossless_cases import normal

pytest.importorskip("safetensors")
from safetensors.torch import save_file as save_plain

INDEX = "model.safetensors.index.json"


def run(*arguments: object) -> int:
    return __main__.main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one shard with an index."""
    made = tmp_path / "model"
    made.mkdir()
    save_plain({"w": normal(300 * 200, torch.bfloat16).reshape(300, 200)}, made / "model.safetensors")
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model.safetensors"}}))
    return made


def codec(path: Path) -> str | None:
    with safe_open(path) as file:
        entry = file.entry("w")
        return entry.codec if entry else None


def test_an_ordinary_copy_is_not_packed(folder: Path) -> None:
    target = folder.with_name("model-flz")
    shutil.copytree(folder, target)
    assert run("pack", folder) == 4 and codec(target / "model.safetensors") is None
    assert run("pack", folder, "--force") == 0 and codec(target / "model.safetensors") == "r8"


def test_a_packed_file_is_not_unpacked(folder: Path) -> None:
    packed, target = folder.with_name("x.flz.safetensors"), folder.with_name("x.safetensors")
    assert run("pack", folder / "model.safetensors", packed) == 0
    shutil.copy(packed, target)
    assert run("unpack", packed) == 4
    assert run("unpack", packed, "--force") == 0 and codec(target) is None


def test_another_tier_is_not_already_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = folder.with_name("model-flz") / "model.safetensors"
    assert run("pack", folder) == 0 and codec(packed) == "r8"
    assert run("pack", folder, "--tier", "fused") == 4 and codec(packed) == "r8"
    assert run("pack", folder, "--codec", "p7", "--force") == 0 and codec(packed) == "p7"
    capsys.readouterr()
    assert run("pack", folder, "--tier", "fused") == 0 and "already there" in capsys.readouterr().out


@pytest.mark.parametrize("mine", ['{"mine": 1}', "no JSON", '{"weight_map": {"w": "other.safetensors"}}', "[1]"])
def test_an_index_of_something_else_stays(folder: Path, mine: str) -> None:
    target = folder.with_name("model-flz")
    target.mkdir()
    (target / INDEX).write_text(mine)
    assert run("pack", folder) == 4 and (target / INDEX).read_text() == mine
    assert run("pack", folder, "--force") == 0 and "stored_size" in (target / INDEX).read_text()
    stale = (target / INDEX).read_text().replace("stored_size", "other_size")
    (target / INDEX).write_text(stale)  # of the same shards: its sizes are made anew
    assert run("pack", folder) == 0 and "stored_size" in (target / INDEX).read_text()


@pytest.mark.parametrize("name", ["model-00002.safetensors", "config.json", "other.safetensors.index.json"])
def test_a_link_to_nowhere_is_missed(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).symlink_to("../blobs/missing")
    assert run("pack", folder) == 3
    assert name in capsys.readouterr().err


def test_links_are_followed(folder: Path) -> None:
    snapshot = folder.with_name("snapshot")
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert run("pack", snapshot, folder.with_name("packed")) == 0
    packed = folder.with_name("packed") / "model.safetensors"
    assert codec(packed) == "r8" and not packed.is_symlink()
