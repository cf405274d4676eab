"""Compressed files where their users are careless: links, long names, full disks, folders, many tensors."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloss.lossless import load_file, safe_open, save_file
from fastloss.lossless.file_statistics import file_statistics

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import save_file as save_plain  # noqa: E402

TENSORS = {"w": torch.arange(12.0).reshape(3, 4)}


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "blob", tmp_path / "model.safetensors"
    if exists:
        real.write_bytes(b"old")
    link.symlink_to(real)
    save_file(TENSORS, link)
    assert link.is_symlink() and torch.equal(load_file(real)["w"], TENSORS["w"])
    assert [p.name for p in real.parent.iterdir()] == ["blob"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("letter", ["n", "ü"])
def test_a_name_as_long_as_names_can_be(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * ((255 - len(".safetensors")) // len(letter.encode())) + ".safetensors")
    (tmp_path / f".{path.name[:20]}.1234.partial").write_bytes(b"someone else's")
    save_file(TENSORS, path)
    save_file(TENSORS, path)
    assert torch.equal(load_file(path)["w"], TENSORS["w"]) and len(list(tmp_path.iterdir())) == 2


def test_errors_of_the_system_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    for use in (lambda p: save_file(TENSORS, p), load_file):
        with pytest.raises(IsADirectoryError) as wrong:
            use(tmp_path / "folder")
        assert wrong.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"No such folder.*missing"):
        save_file(TENSORS, tmp_path / "missing" / "x.safetensors")

    class Full:
        """A file on a disk with no room."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda p, mode="r", *a: Full(real(p, mode, *a)) if mode == "xb" else real(p, mode, *a)
    )
    with pytest.raises(OSError, match=r"No space left.*x\.safetensors") as full:
        save_file(TENSORS, tmp_path / "x.safetensors")
    assert full.value.filename == str(tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tensors": [torch.ones(3)]}, "tensors must be a mapping of names, got list"),
        ({"metadata": ["pt"]}, "metadata must be a mapping of names, got list"),
        ({"min_bytes": "1"}, "min_bytes must be a whole number, got '1'"),
        ({"workers": 2.5}, r"workers must be a whole number, got 2\.5"),
    ],
)
def test_wrong_kinds_of_arguments(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        save_file(**{"tensors": TENSORS, "filename": tmp_path / "x.safetensors", **arguments})


def test_names_of_an_ordinary_file_are_asked_for_once(tmp_path: Path) -> None:
    path, count = tmp_path / "x.safetensors", 50
    save_plain({f"layer.{k}": torch.ones(2) for k in range(count)}, path)
    with safe_open(path) as file:
        asked = []

        class Counting:
            def __getattr__(self, name: str) -> Any:
                asked.append(name)
                return getattr(inner, name)

        inner, file._file = file._file, Counting()
        for name in file.keys():
            file.get_tensor(name)
        with pytest.raises(KeyError):
            file.get_tensor("layer")
    assert asked.count("keys") == 1, "a list of all names, for each of them"
    assert len(file_statistics(path)) == count
