"""Blobs and a file of format 1 as they were written first: they decode forever, and encoders write the same bytes.

`python tests/lossless/test_golden_flz1.py` prints the JSON of the golden file; it is for a new case, never for a changed one.
"""

from __future__ import annotations

import base64
import json
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.lossless import CompressedTensor, compress, load_file, safe_open, save_file, verify_file
from lossless_cases import INTEGERS, bits
from lossless_files import same

GOLDEN = Path(__file__).with_name("golden_flz1.json")
#: (codec, dtype, layout, shape). What they hold is `numbers`.
CASES = (
    ("p7", "bfloat16", "rows", (3, 500)), ("p7", "bfloat16", "tiles", (16, 256)), ("p7", "float16", "rows", (7000,)),
    ("p7", "float32", "rows", (3, 700)), ("r8", "bfloat16", "rows", (1501,)), ("r8", "float16", "rows", (2, 5, 300)),
    ("r8", "float32", "rows", (1300,)), ("r8", "float8_e4m3fn", "rows", (2999,)), ("r8", "float8_e5m2", "rows", (2100,)),
    ("r8", "float8_e4m3fnuz", "rows", (40, 70)), ("raw", "bfloat16", "rows", (5,)), ("raw", "int64", "rows", (2, 3)),
    ("raw", "float32", "rows", ()), ("raw", "bool", "rows", (0, 4)),
)  # fmt: skip
_FIELDS = {"bfloat16": (7, 8), "float16": (10, 5), "float32": (23, 8), "float8_e4m3fn": (3, 4), "float8_e5m2": (2, 5)}


def numbers(dtype_name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers by whole-number arithmetic alone, the same everywhere: exponents that fall off, and every so often any bits."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    count, width = torch.Size(shape).numel(), 8 * dtype.itemsize
    index = torch.arange(count, dtype=torch.int64)
    hashed = index * 2654435761 % 2**32
    hashed = (hashed ^ hashed >> 15) * 2246822519 % 2**32
    hashed = hashed ^ hashed >> 13
    if dtype == torch.bool:
        return (hashed % 2 == 1).reshape(shape)
    other = (hashed * 3266489917 % 2**32) ^ hashed >> 16
    value = hashed << 32 | other
    if dtype_name.replace("uz", "") in _FIELDS:
        bit, field_bits = _FIELDS[dtype_name.replace("uz", "")]
        step = sum((hashed % 2 ** (k + 1) == 0).to(torch.int64) for k in range(6))
        field = (2**field_bits // 2 - 2 - step).clamp(min=0)
        regular = other % 2**width & ~((2**field_bits - 1) << bit) | field << bit
        value = torch.where(index % 61 == 7, other % 2**width, regular)
    raw = value.view(torch.uint8).reshape(-1, 8)[:, : dtype.itemsize].contiguous()
    return raw.reshape(-1).view(dtype).reshape(shape)


def model() -> dict[str, Tensor]:
    """What the golden file holds."""
    weight = numbers("bfloat16", (30, 60))
    return {"weight": weight, "bias": numbers("float32", (9,)), "tied": weight, "steps": torch.tensor(7)}


def packed(data: bytes) -> list[str]:
    return textwrap.wrap(base64.b64encode(data).decode(), 100)


def unpacked(lines: list[str]) -> bytes:
    return base64.b64decode("".join(lines))


def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def name(case: tuple[str, str, str, tuple[int, ...]]) -> str:
    return " ".join((*case[:3], "x".join(map(str, case[3]))))


@pytest.fixture(params=["fastest", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        with fastloss.use_backend("reference"):
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("case", CASES, ids=name)
def test_golden_blobs(case: tuple[str, str, str, tuple[int, ...]], backend: str) -> None:
    codec, dtype, layout, shape = case
    entry, want = golden()["blobs"][name(case)], numbers(dtype, shape)
    assert zlib.crc32(bits(want).numpy().tobytes()) == entry["numbers_crc32"]
    blob = torch.frombuffer(bytearray(unpacked(entry["blob"])), dtype=torch.uint8)
    stored = CompressedTensor(blob)
    stored.verify()
    got = stored.decompress()
    assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got), bits(want))
    assert stored.codec.name.lower() == codec and stored.layout.name.lower() == layout
    assert torch.equal(compress(want, codec, layout=layout).blob, blob)


def test_golden_file(tmp_path: Path, backend: str) -> None:
    """The whole container: read, and written again byte for byte."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(unpacked(golden()["file"]))
    verify_file(path)
    assert same(load_file(path), model())
    with safe_open(path) as file:
        assert file.metadata() == {"format": "pt", "name": "golden é"}
    save_file(model(), tmp_path / "again.safetensors", {"name": "golden é", "format": "pt"}, min_bytes=1024)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_golden_cases_are_of_their_kind() -> None:
    """Among the numbers there are escapes, NaNs, infinities, denormals and both zeros."""
    assert set(golden()["blobs"]) == {name(case) for case in CASES}
    everything = torch.cat([numbers("bfloat16", c[3]).reshape(-1) for c in CASES if c[1] == "bfloat16"])
    words = everything.view(INTEGERS[2])
    assert words.unique().numel() > 1000 and bool(everything.isnan().any())
    for codec in ("p7", "r8"):
        assert sum(case[0] == codec for case in CASES) >= 4


if __name__ == "__main__":
    import tempfile

    blobs = {}
    for case in CASES:
        x = numbers(case[1], case[3])
        ct = compress(x, case[0], layout=case[2])
        assert ct.codec.name.lower() == case[0], (case, ct)
        blobs[name(case)] = {
            "numbers_crc32": zlib.crc32(bits(x).numpy().tobytes()),
            "blob": packed(ct.blob.numpy().tobytes()),
        }
    with tempfile.TemporaryDirectory() as folder:
        save_file(model(), folder + "/x.safetensors", {"format": "pt", "name": "golden é"}, min_bytes=1024)
        whole = packed(Path(folder + "/x.safetensors").read_bytes())
    print(json.dumps({"format": "FLZ1", "blobs": blobs, "file": whole}, indent=1, ensure_ascii=False))
