"""What is in a file: a line a tensor, and totals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from .safe_open import safe_open


class TensorStatistics(NamedTuple):
    """One tensor: `bytes` when it is decoded, `stored` in the file (0 where another tensor has the same bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    bytes: int
    stored: int


def file_statistics(filename: str | os.PathLike[str]) -> list[TensorStatistics]:
    """The tensors of a file; only its header is read.

    Raises CorruptError, FormatError and OSError as `safe_open` does.
    """
    rows = []
    with safe_open(filename, verify="header") as file:
        for name in file.keys():
            entry = file.entry(name)
            stored = file.get_stored(name).numel()
            if entry is None:
                part = file.get_slice(name)
                rows.append(TensorStatistics(name, part.get_dtype(), tuple(part.get_shape()), "plain", stored, stored))
                continue
            codec = entry.codec if entry.same_as is None else f"same as {entry.same_as}"
            dtype = str(entry.dtype).removeprefix("torch.")
            kept = stored if entry.same_as is None else 0
            rows.append(TensorStatistics(name, dtype, entry.shape, codec, entry.nbytes, kept))
    return rows


def _totals(rows: list[TensorStatistics], size: int) -> dict[str, Any]:
    dense = sum(row.bytes for row in rows)
    ratio = size / dense if dense else None
    return {"tensors": len(rows), "bytes": dense, "stored": sum(r.stored for r in rows), "file": size, "ratio": ratio}


def print_statistics(files: list[Path], as_json: bool) -> None:
    """Print the statistics of some files as tables or as JSON; a ratio is stored / decoded bytes, a file's with its header."""
    found = [(file, file_statistics(file), os.path.getsize(file)) for file in files]
    everything = _totals([row for _, rows, _ in found for row in rows], sum(size for *_, size in found))
    if as_json:
        report = [
            {"file": str(file), "tensors": [row._asdict() for row in rows], "total": _totals(rows, size)}
            for file, rows, size in found
        ]
        print(json.dumps({"files": report, "total": everything}, indent=1))
        return
    for file, rows, size in found:
        print(file)
        width = max((len(row.name) for row in rows), default=4)
        print(
            f"  {'tensor':{width}s}  {'dtype':14s} {'shape':>18s}  {'codec':6s} {'bytes':>12s} {'stored':>12s}  ratio"
        )
        for row in rows:
            shape = " x ".join(map(str, row.shape)) or "scalar"
            print(
                f"  {row.name:{width}s}  {row.dtype:14s} {shape:>18s}  {row.codec:6s} {row.bytes:12d} {row.stored:12d}"
                f"  {_percent(row.stored, row.bytes)}"
            )
        _print_total("  total", _totals(rows, size))
    if len(files) > 1:
        _print_total("all files", everything)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:6.2f} %" if whole else "     -"


def _print_total(what: str, total: dict[str, Any]) -> None:
    print(
        f"{what}: {total['tensors']} tensors, {total['bytes']} bytes in a file of {total['file']}: "
        f"{_percent(total['file'], total['bytes']).strip()}"
    )
