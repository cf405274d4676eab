"""The commands `fastloss pack | unpack | verify | stat`.

Exit codes: 0 all is well; 1 a file is damaged, or differs from what it should hold; 2 a wrong command line, or input that
cannot be packed; 3 a file cannot be read or written, or a package is missing; 4 something would be overwritten (--force);
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import pack as packing
from .errors import CorruptError, FormatError
from .file_statistics import print_statistics
from .progress import ProgressBar
from .verify_file import find_damage

OK, DAMAGED, USAGE, SYSTEM, EXISTS, INTERRUPTED = 0, 1, 2, 3, 4, 130
COMMANDS = ("pack", "unpack", "verify", "stat")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandError(Exception):
    """A command that ends with a message and an exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def add_commands(commands: Any) -> None:
    """Add the four commands to an argparse's subparsers."""
    pack = commands.add_parser(
        "pack", help="compress .safetensors files, bit for bit", epilog=(__doc__ or "").split("\n\n")[1]
    )
    unpack = commands.add_parser("unpack", help="the ordinary .safetensors files back")
    for command, suffix in ((pack, "x.flz.safetensors, or folder-flz"), (unpack, "the name without flz")):
        command.add_argument("source", type=Path, help="a .safetensors file, or a folder (shards, index, other files)")
        command.add_argument("target", type=Path, nargs="?", help=f"where to (default: {suffix})")
        command.add_argument("--force", action="store_true", help="overwrite what is there and is something else")
        command.add_argument("--quiet", action="store_true", help="print errors only")
    pack.add_argument(
        "--tier", choices=("storage", "fused"), default="storage", help="smallest, or fastest (default: %(default)s)"
    )
    pack.add_argument("--codec", choices=("auto", "r8", "p7", "raw"), default="auto", help="default: that of the tier")
    pack.add_argument(
        "--dtype", choices=tuple(DTYPES), help="round floating-point numbers to it first (this loses bits)"
    )
    pack.add_argument(
        "--workers", type=int, default=1, help="tensors compressed at the same time (default: %(default)s)"
    )
    pack.add_argument("--no-verify", action="store_true", help="do not read back and compare what was written")
    verify = commands.add_parser("verify", help="check every byte of compressed files")
    verify.add_argument("source", type=Path, nargs="+", help=".safetensors files or folders")
    verify.add_argument("--against", type=Path, help="the file or folder that was packed: compare every tensor with it")
    verify.add_argument("--quiet", action="store_true", help="print errors only")
    stat = commands.add_parser("stat", help="what the tensors of files are, and how small they became")
    stat.add_argument("source", type=Path, nargs="+", help=".safetensors files or folders")
    stat.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run one of COMMANDS; its exit code."""
    command: Callable[[argparse.Namespace], int] = {
        "pack": _transfer, "unpack": _transfer, "verify": _verify, "stat": _stat
    }[arguments.command]  # fmt: skip
    try:
        return command(arguments)
    except CommandError as error:
        return _fail(error.code, error)
    except (CorruptError, packing.DifferError, FormatError) as error:
        return _fail(DAMAGED, error)
    except (TypeError, ValueError) as error:
        return _fail(USAGE, error)
    except (OSError, ImportError) as error:
        return _fail(SYSTEM, error)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")


def _fail(code: int, error: object) -> int:
    print(f"fastloss: {error}", file=sys.stderr)
    return code


def _exists(path: Path) -> Path:
    if not path.exists():
        raise CommandError(SYSTEM, f"{path} does not exist")
    return path


def _target(source: Path, target: Path | None, is_pack: bool) -> Path:
    """Where a command writes to; never the source, nor into it."""
    if target is None:
        target = _default_target(source, is_pack)
    elif source.is_file() and target.is_dir():
        target = target / source.name
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise CommandError(USAGE, f"the target {target} lies in the source {source}")
    if source.is_dir() and target.is_file():
        raise CommandError(EXISTS, f"{target} is a file, {source} a folder")
    return target


def _default_target(source: Path, is_pack: bool) -> Path:
    if source.is_dir():
        name = source.resolve().name
        if is_pack:
            return source.resolve().with_name(name + "-flz")
        if name.endswith("-flz"):
            return source.resolve().with_name(name.removesuffix("-flz"))
    else:
        stem = source.name.removesuffix(".safetensors")
        if is_pack:
            return source.with_name(stem + ".flz.safetensors")
        if stem.endswith(".flz"):
            return source.with_name(stem.removesuffix(".flz") + ".safetensors")
    raise CommandError(USAGE, f"say where to unpack {source}: its name does not end in flz")


def _transfer(arguments: argparse.Namespace) -> int:
    is_pack = arguments.command == "pack"
    if is_pack and arguments.workers < 1:
        raise CommandError(USAGE, f"--workers must be at least 1, got {arguments.workers}")
    source = _exists(arguments.source)
    target = _target(source, arguments.target, is_pack)
    with ProgressBar(arguments.quiet) as bar:
        if source.is_file():
            _transfer_file(source, target, arguments, bar)
            return OK
        _transfer_folder(source, target, arguments, bar)
    return OK


def _codec(arguments: argparse.Namespace) -> str:
    """The codec that pack is to take."""
    of_tier = "p7" if arguments.tier == "fused" else "r8"
    return of_tier if arguments.codec == "auto" else str(arguments.codec)


def _transfer_file(source: Path, target: Path, arguments: argparse.Namespace, bar: ProgressBar) -> None:
    is_pack, start = arguments.command == "pack", time.perf_counter()
    dtype = DTYPES.get(arguments.dtype) if is_pack else None
    total = os.path.getsize(source)
    if target.exists():
        bar.begin(f"checking {target.name}", total)
        if packing.is_done(source, target, _codec(arguments) if is_pack else None, dtype):
            _say(arguments, f"{target}: already there")
            return
        if not arguments.force:
            raise CommandError(EXISTS, f"{target} is there and is something else: --force overwrites it")
    target.parent.mkdir(parents=True, exist_ok=True)
    bar.begin(source.name, total)
    if is_pack:
        verify = not arguments.no_verify
        bar.begin(source.name, total * (1 + verify))
        packing.pack(source, target, arguments.tier, arguments.codec, dtype, arguments.workers, verify, bar.advance)
    else:
        packing.unpack(source, target, bar.advance)
    before, after = os.path.getsize(source), os.path.getsize(target)
    _say(
        arguments,
        f"{target}: {before} -> {after} bytes, {100 * after / max(before, 1):.2f} %, {time.perf_counter() - start:.1f} s",
    )


def _transfer_folder(source: Path, target: Path, arguments: argparse.Namespace, bar: ProgressBar) -> None:
    is_pack = arguments.command == "pack"
    dtype = DTYPES.get(arguments.dtype) if is_pack else None
    names = packing.shards(source)
    if not names:
        raise CommandError(USAGE, f"{source} has no .safetensors files")
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        _transfer_file(source / name, target / name, arguments, bar)
    for name in packing.indexes(source):  # last of what belongs together: it tells that the shards are there
        if (target / name).exists() and not arguments.force and not packing.is_index_of(target / name, source / name):
            raise CommandError(EXISTS, f"{target / name} is there and is something else: --force overwrites it")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        packing.write_index(source / name, target / name, is_pack, dtype)
    for name in packing.other_files(source):
        if packing.same_bytes(source / name, target / name):
            continue
        if (target / name).exists() and not arguments.force:
            raise CommandError(EXISTS, f"{target / name} is there and is something else: --force overwrites it")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        packing.copy(source / name, target / name)
        _say(arguments, f"{target / name}: copied")


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.quiet:
        print(line, flush=True)


def _files(paths: list[Path]) -> list[Path]:
    found = []
    for path in paths:
        names = [path / name for name in packing.shards(path)] if _exists(path).is_dir() else [path]
        if not names:
            raise CommandError(USAGE, f"{path} has no .safetensors files")
        found += names
    return found


def _verify(arguments: argparse.Namespace) -> int:
    code = OK
    for path in arguments.source:
        for file in _files([path]):
            damage = find_damage(file)
            for error in damage:
                code = _fail(DAMAGED, f"{file}: {error}")
            if not damage and arguments.against is not None:
                original = arguments.against
                if path.is_dir():
                    original = original / file.relative_to(path)
                packing.compare(_exists(original), file)
            if not damage:
                _say(
                    arguments,
                    f"{file}: ok" + ("" if packing.is_packed(file) else ", an ordinary file without checksums"),
                )
    return code


def _stat(arguments: argparse.Namespace) -> int:
    print_statistics(_files(arguments.source), arguments.json)
    return OK
