"""Small compressed files, and every way of damaging them, shared by the tests of files."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss import backend_cpp
from fastloss.compiled import _C
from fastloss.lossless import CorruptError, FormatError, load_file, safe_open, save_file, verify_file
from fastloss.lossless.crc32c_table import of_bytes
from fastloss.lossless.header import read as read_blob
from lossless_cases import bits, constant, mostly_normal, normal, uniform_bits

USER = {"format": "pt", "note": "the user's own"}
MIN_BYTES = 1024


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tensor of each kind: every dtype that is coded, escapes, plain ones, a tied and an equal one."""
    t = {
        "w.bf16": normal(1500, torch.bfloat16, seed).reshape(50, 30),
        "w.fp16": normal(9000, torch.float16, seed).reshape(3, 30, 100),
        "escapes": mostly_normal(3000, torch.bfloat16, seed).reshape(30, 100),
        "w.fp32": normal(3000, torch.float32, seed).reshape(30, 100),
        "w.e4m3": normal(4000, torch.float8_e4m3fn, seed).reshape(40, 100),
        "w.e5m2": normal(3000, torch.float8_e5m2, seed).reshape(30, 100),
        "really bf16": normal(700, torch.bfloat16, seed).float().reshape(7, 100),
        "noise": uniform_bits(700, torch.bfloat16, seed).reshape(7, 100),
        "constant": constant(2000, torch.bfloat16).reshape(2, 1000),
        "fnuz": normal(70, torch.float8_e4m3fnuz, seed),
        "bias": normal(33, torch.float32, seed),
        "odd": torch.arange(3, dtype=torch.int8),  # what another tool writes behind it is not aligned
        "ids": torch.arange(5) + seed,
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5 + seed),
        "empty": torch.empty(0, 3),
    }
    t["tied"] = t["w.bf16"]
    t["equal"] = t["w.fp16"].clone()
    return t


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


class Original(NamedTuple):
    """A whole file: its bytes, where its data begins, where its blobs lie, and what it holds."""

    data: bytes
    start: int
    blobs: list[tuple[int, int]]
    holds: dict[str, Tensor]


def original(folder: Path, tier: str, seed: int, names: tuple[str, ...] | None = None) -> Original:
    """A file of `tensors`."""
    holds = {k: v for k, v in tensors(seed).items() if names is None or k in names}
    path = folder / f"original-{tier}-{seed}.safetensors"
    save_file(holds, path, USER, tier, min_bytes=MIN_BYTES)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    blobs = [tuple(v["data_offsets"]) for k, v in header.items() if k.endswith(".flz")]
    return Original(data, start, [(start + a, start + b) for a, b in sorted(blobs)], holds)


def _flip(at: int, data: bytearray, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def flip_anywhere(file: Original, other: Original, rng: random.Random) -> bytes:
    """One to four bits."""
    data = bytearray(file.data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _flip(rng.randrange(len(data)), data, rng)
    return bytes(data)


def flip_header(file: Original, other: Original, rng: random.Random) -> bytes:
    """One bit of the container's header or its length."""
    data = bytearray(file.data)
    _flip(rng.randrange(file.start), data, rng)
    return bytes(data)


def flip_section(file: Original, other: Original, rng: random.Random) -> bytes:
    """One bit of one part of one blob: header, a section, or the zeros between."""
    data = bytearray(file.data)
    begin, end = rng.choice(file.blobs)
    header = read_blob(torch.frombuffer(data[begin:end], dtype=torch.uint8))
    spans = [(offset, offset + count) for offset, count, _ in header.sections.values()]
    ends = [spans[0][0] if spans else 64, *(b for _, b in spans)]
    starts = [*(a for a, _ in spans), end - begin]
    gaps = [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]
    low, high = rng.choice([(0, 64), *spans, *gaps])
    _flip(begin + rng.randrange(low, high), data, rng)
    return bytes(data)


def truncate(file: Original, other: Original, rng: random.Random) -> bytes:
    """Less, or more, at the end."""
    if rng.random() < 0.2:
        return file.data + rng.randbytes(rng.choice((1, 8, 64, 1000)))
    return file.data[: rng.choice((rng.randrange(len(file.data)), rng.randrange(file.start), len(file.data) - 1))]


def splice(file: Original, other: Original, rng: random.Random) -> bytes:
    """The header of one file before the data of another, a blob in the place of another, runs moved or wiped."""
    kind = rng.randrange(4)
    if kind == 0:
        return file.data[: file.start] + other.data[other.start :]
    data = bytearray(file.data)
    if kind == 1:
        (a, b), (c, d) = rng.choice(file.blobs), rng.choice(other.blobs)
        size = min(b - a, d - c)
        data[a : a + size] = other.data[c : c + size]
    else:
        size = rng.choice((4, 8, 64, 512))
        a, b = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
        data[a : a + size] = data[b : b + size] if kind == 2 else rng.choice((bytes(size), rng.randbytes(size)))
    return bytes(data)


_ABSURD = (
    0,
    1,
    7,
    63,
    65,
    127,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53,
    2**61,
    2**62,
    2**63,
    2**64 - 1,
    -1,
)


def absurd_blob(file: Original, other: Original, rng: random.Random) -> bytes:
    """A number of a blob's header made absurd, its checksum right again: what no accident does, but a hostile writer."""
    data = bytearray(file.data)
    begin, end = rng.choice(file.blobs)
    dimensions, count = data[begin + 9], struct.unpack_from("<H", data, begin + 10)[0]
    size = 28 + 8 * dimensions + 24 * count
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            data[begin + rng.randrange(4, size)] = rng.randrange(256)
        else:
            at = begin + rng.choice(
                [12, 20, *range(28, 28 + 8 * dimensions, 8), *range(28 + 8 * dimensions + 8, size - 8, 8)]
            )
            struct.pack_into("<Q", data, at, rng.choice(_ABSURD) % 2**64)
    dimensions, count = data[begin + 9], struct.unpack_from("<H", data, begin + 10)[0]
    size = 28 + 8 * dimensions + 24 * count
    if begin + size + 4 <= end:
        struct.pack_into("<I", data, begin + size, of_bytes(bytes(data[begin : begin + size])))
    return bytes(data)


def absurd_section(file: Original, other: Original, rng: random.Random) -> bytes:
    """Random bytes for a whole section, the checksums of section and blob right again: a decoder must survive any content."""
    data = bytearray(file.data)
    begin, end = rng.choice(file.blobs)
    header = read_blob(torch.frombuffer(data[begin:end], dtype=torch.uint8))
    place = rng.randrange(len(header.sections))
    offset, count, _ = list(header.sections.values())[place]
    if rng.random() < 0.5:
        data[begin + offset : begin + offset + count] = rng.randbytes(count)
    else:
        for _ in range(3):
            at = begin + offset + rng.randrange(max(count - 7, 1))
            data[at : at + min(count, 8)] = struct.pack("<Q", rng.choice(_ABSURD) % 2**64)[: min(count, 8)]
    entry = begin + 28 + 8 * len(header.shape) + 24 * place
    struct.pack_into("<I", data, entry + 4, of_bytes(bytes(data[begin + offset : begin + offset + count])))
    size = 28 + 8 * len(header.shape) + 24 * len(header.sections)
    struct.pack_into("<I", data, begin + size, of_bytes(bytes(data[begin : begin + size])))
    return bytes(data)


def absurd_container(file: Original, other: Original, rng: random.Random) -> bytes:
    """A number or a word in the container's JSON or in the index made another one."""
    header = json.loads(file.data[8 : file.start])
    name = rng.choice([k for k in header if k != "__metadata__"])
    kind = rng.randrange(7)
    if kind == 0:
        header[name]["shape"] = rng.choice(
            ([], [rng.choice(_ABSURD)], [2**32, 2**32], [0, 2**61], header[name]["shape"] * 2)
        )
    elif kind == 1:
        header[name]["data_offsets"][rng.randrange(2)] = rng.choice(_ABSURD)
    elif kind == 2:
        header[name]["dtype"] = rng.choice(("U8", "I8", "F32", "BF16", "F64", "F4", "X"))
    elif kind == 3:
        header[rng.choice(("x", "w.bf16", "__metadata__"))] = header.pop(name)
    elif kind == 4:
        header["__metadata__"][rng.choice(("fastloss.flz", "fastloss.crc32c", "format"))] = rng.choice(
            ("0", "2", "x", "1.7", "")
        )
    elif kind == 5:
        header["__metadata__"].pop(rng.choice([*header["__metadata__"]]))
    else:
        text = header["__metadata__"]["fastloss.tensors"]
        at = rng.randrange(len(text))
        header["__metadata__"]["fastloss.tensors"] = (
            text[:at] + rng.choice(("", "[", "9", '"', "-", "w")) + text[at + 1 :]
        )
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return len(head).to_bytes(8, "little") + head + file.data[file.start :]


DAMAGES: tuple[Callable[[Original, Original, random.Random], bytes], ...] = (
    flip_anywhere, flip_header, flip_section, truncate, splice, absurd_blob, absurd_section, absurd_container,
)  # fmt: skip


def judge(path: Path, file: Original, is_hostile: bool = False) -> str:
    """What a damaged file does.

    "found": `load_file` refuses it. "spare": every tensor and the metadata are right, and `verify_file` refuses it: bits that no
    number depends on. "equivalent": everything is right, checksums too, as a hostile writer can have it; without
    `is_hostile` that is "overlooked". All else is wrong, as is any error but the two that are documented.
    """
    with contextlib.suppress(CorruptError, FormatError):
        load_file(path, verify="off")
    try:
        verify_file(path)
        is_whole = True
    except (CorruptError, FormatError):
        is_whole = False
    try:
        loaded = load_file(path)
        with safe_open(path) as opened:
            metadata = opened.metadata()
    except (CorruptError, FormatError):
        return "verify_file passed what load_file refused" if is_whole else "found"
    if not same(loaded, file.holds) or metadata != USER:
        return "undetected"
    return "spare" if not is_whole else "equivalent" if is_hostile else "overlooked"


GOOD = ("found", "spare", "equivalent")


def damage_many(folder: Path, seed: int, count: int) -> dict[str, int]:
    """How many of `count` damaged files had which outcome, on all instruction sets; what is wrong stays in `folder`."""
    rng = random.Random(seed)
    small = ("w.bf16", "escapes", "ids", "tied")
    files = [
        [original(folder, tier, s, names) for s in (2 * k, 2 * k + 1)]
        for k, (tier, names) in enumerate((("storage", None), ("fused", None), ("storage", small), ("fused", small)))
    ]
    outcomes: dict[str, int] = {}
    levels = (-1, *range(_C.best_isa() + 1)) if _C is not None else (-1,)
    path = folder / "damaged.safetensors"
    for i in range(count):
        file, other = rng.choice(files)
        damage = DAMAGES[i % len(DAMAGES)]
        data = damage(file, other, rng)
        while data == file.data:  # what was moved may have been the same
            data = damage(file, other, rng)
        path.write_bytes(data)
        backend_cpp.ISA = rng.choice(levels)
        outcome = judge(path, file, damage.__name__.startswith("absurd"))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome not in GOOD:
            (folder / f"bad-{seed}-{i}-{damage.__name__}.safetensors").write_bytes(data)
    backend_cpp.ISA = -1
    return outcomes


if __name__ == "__main__":  # python lossless_files.py FOLDER SEED COUNT, in a process that may crash
    import sys

    torch.set_num_threads(1)
    print(json.dumps(damage_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
