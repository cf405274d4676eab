"""What tests/test_gpu_lossless.py checks on a GPU: every lossless kernel against the reference on the CPU, byte by byte."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastloss
import lossless_blobs
from fastloss import registry
from fastloss.lossless.contract import BLOCK, NUMBERS, P7_NUMBERS, PLAN_HEAD, Layout, Section, frequencies, pair_table
from fastloss.lossless.crc32c_table import of_bytes
from lossless_blobs import Made
from lossless_cases import CODED, INTEGERS, bits, mostly_normal, normal, uniform_bits

PAIRED = tuple(d for d in CODED if NUMBERS[d] in P7_NUMBERS)
#: Around eight numbers, a group, a block, several blocks.
SIZES = (1, 2, 63, 65, 127, 128, 129, 16383, 16384, 16385, 40001)


def same(got: Any, want: Any, what: str) -> None:
    """Equal bytes, on whatever device."""
    for a, b in zip(*((r,) if isinstance(r, Tensor) else _flat(r) for r in (got, want)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype} {list(a.shape)}"
        assert torch.equal(bits(a).cpu(), bits(b).cpu()), what


def _flat(result: Any) -> list[Tensor]:
    return [t for part in result for t in (part if isinstance(part, list) else [part])]


def blobs(dtype: torch.dtype, count: int, columns: int = 0) -> list[Made]:
    """R8 with and without coded byte planes, and P7 where the dtype has it."""
    x = mostly_normal(count, dtype)
    made = [lossless_blobs.r8(x, columns), lossless_blobs.r8(x, columns, (0, 2))]
    return made + ([lossless_blobs.p7(x, columns)] if dtype in PAIRED else [])


def check_decode(backend: str, device: str, made: Made) -> None:
    """All numbers, and ranges that begin and end anywhere."""
    blob, n, x = made.blob.to(device), made.numbers.numel(), made.numbers
    for first, count in ((0, n), (n // 3, n // 2), (n - 1, 1), (0, 0)):
        with fastloss.use_backend(backend):
            got = torch.ops.fastloss.lossless_decode(blob, made.plan, first, count, x.dtype)
        same(got, x[first : first + count], f"{made.plan[:6]} {first}..{first + count}")


def check_tiles(backend: str, device: str, dtype: torch.dtype) -> None:
    for rows, columns in ((16, 128), (48, 384), (256, 1024)):
        made = lossless_blobs.p7(mostly_normal(rows * columns, dtype), columns, Layout.TILES)
        blob, band = made.blob.to(device), 16 * columns
        for first, count in ((0, rows * columns), (rows * columns - band, band)):
            with fastloss.use_backend(backend):
                got = torch.ops.fastloss.lossless_decode(blob, made.plan, first, count, dtype)
            same(got, made.numbers[first : first + count], f"tiles {rows} x {columns}")


def check_rows(backend: str, device: str, made: Made) -> None:
    """Rows in any order and twice; on CUDA the rows of ids out of bounds are zeros."""
    rows, columns = made.plan[4:6]
    matrix = made.numbers.view(INTEGERS[made.numbers.element_size()]).reshape(rows, columns)
    for width in (torch.int64, torch.int32):
        index = torch.tensor([1 % rows, 0, rows - 1, 0, -1, rows, 2**31 - 1], dtype=width)
        good = (index >= 0) & (index < rows)
        want = torch.where(good[:, None], matrix[index.long().clamp(0, rows - 1)], 0).view(made.numbers.dtype)
        with fastloss.use_backend(backend):
            got = torch.ops.fastloss.lossless_rows(
                made.blob.to(device), made.plan, index.to(device), made.numbers.dtype
            )
        same(got, want, f"rows of {made.plan[:6]}")


def checksums(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes."""
    return torch.tensor([of_bytes(bytes(part.tolist())) for part in data.split(block)])


def check_crc32c(backend: str, device: str) -> None:
    data = uniform_bits(300007, torch.uint8)
    for first, block in ((0, 32768), (1, 4097), (4, 300000), (0, 1000000), (3, 65536)):
        part = data[first:] if block > 5000 else data[first:9001]
        want = checksums(part, block)
        with fastloss.use_backend(backend):
            same(
                torch.ops.fastloss.crc32c(data.to(device)[first : first + part.numel()], block), want, f"crc32c {block}"
            )


def check_encoders(backend: str, device: str, x: Tensor) -> None:
    """Histograms and every section, from a tensor that does not begin at a multiple of 16 bytes too."""

    def both(op: str, *arguments: Any) -> Any:
        with fastloss.use_backend("reference"):
            want = registry.run(op, *arguments)
        given = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        with fastloss.use_backend(backend):
            same(registry.run(op, *given), want, f"{op} of {x.numel()} {x.dtype}")
        return want

    if x.dtype in PAIRED:
        both("p7_encode", x, torch.from_numpy(pair_table(both("p7_histogram", x).numpy())))
    planes, _ = both("byte_split", x)
    for plane in planes:
        counts = both("byte_histogram", plane, x.numel())
        both("r8_encode", plane, torch.from_numpy(frequencies(counts.numpy())), x.numel())
    shifted = torch.cat((x[:1], x)).to(device)[1:]
    with fastloss.use_backend(backend):
        same(registry.run("byte_split", shifted)[0], planes, "byte_split of a slice")


def check_checked(backend: str, device: str, made: Made) -> None:
    """-1, or the first block that is not what it was."""
    item, n = made.numbers.element_size(), made.numbers.numel()
    crc = checksums(bits(made.numbers), BLOCK * item)
    at = made.blob.numel()
    tail = torch.cat((crc.to(torch.int32).view(torch.uint8), torch.zeros(128, dtype=torch.uint8)))
    blob = torch.cat((made.blob, torch.zeros(-at % 64, dtype=torch.uint8), tail)).to(device)
    plan = list(made.plan)
    plan[PLAN_HEAD + 2 * Section.BLOCK_CRC :] = at + -at % 64, 4 * crc.numel()
    out = torch.empty(n, dtype=made.numbers.dtype, device=device)
    with fastloss.use_backend(backend):
        assert registry.run("lossless_decode_checked", blob, plan, out) == -1
        same(out, made.numbers, "decoded and checked")
        blob[plan[PLAN_HEAD + 2 * Section.BLOCK_CRC] + 4 * (crc.numel() - 1)] ^= 1
        assert registry.run("lossless_decode_checked", blob, plan, out) == crc.numel() - 1


def check_hostile(backend: str, device: str, dtype: torch.dtype) -> None:
    """Random bytes in every section: no error, and the device is well afterwards."""
    for made in blobs(dtype, 149 * 112, 149):
        noise = uniform_bits(made.blob.numel(), torch.uint8, 3).to(device)
        for kind in Section:
            at, count = made.plan[PLAN_HEAD + 2 * kind : PLAN_HEAD + 2 * kind + 2]
            blob = made.blob.to(device)
            blob[at : at + count] = noise[at : at + count]
            with fastloss.use_backend(backend):
                torch.ops.fastloss.lossless_decode(blob, made.plan, 0, made.numbers.numel(), dtype)
                torch.ops.fastloss.lossless_rows(blob, made.plan, torch.tensor([111, 0], device=device), dtype)
    check_decode(backend, device, lossless_blobs.r8(normal(5000, dtype)))
