"""Calls of the CUDA kernels of the lossless codecs, with the bytes that the reference has for them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lossless_blobs
from cuda_host.lossless import Case
from fastloss.lossless import reference_p7, reference_r8
from fastloss.lossless.contract import NUMBERS, P7_NUMBERS, PLAN_HEAD, Layout, Section, frequencies, pair_table
from fastloss.lossless.crc32c_table import of_bytes
from lossless_blobs import Made
from lossless_cases import CODED, INTEGERS, bits, mostly_normal, uniform_bits

PAIRED = tuple(d for d in CODED if NUMBERS[d] in P7_NUMBERS)


def decoded(made: Made, first: int = 0, count: int | None = None) -> Case:
    """The decoder for numbers first..first+count."""
    count = made.numbers.numel() - first if count is None else count
    want = bits(made.numbers[first : first + count]).numpy()
    return Case("decode", [made.blob.numpy(), made.plan, first, count, made.numbers.element_size()], want)


def gathered(made: Made, index: Tensor) -> Case:
    """The decoder for rows; those out of bounds are zeros."""
    rows, columns = made.plan[4:6]
    integers = made.numbers.view(INTEGERS[made.numbers.element_size()]).reshape(rows, columns)
    good = (index >= 0) & (index < rows)
    want = torch.where(good[:, None], integers[index.clamp(0, rows - 1).long()], 0)
    arguments = [made.blob.numpy(), made.plan, index.numpy(), made.numbers.element_size()]
    return Case("rows", arguments, bits(want).numpy())


def ranges(made: Made) -> list[Case]:
    """All numbers, and some that begin and end anywhere."""
    n = made.numbers.numel()
    return [
        decoded(made),
        *(decoded(made, f, c) for f, c in ((n // 3, n // 2), (n - 1, 1), (8 * (n // 24), n // 3)) if c),
    ]


@functools.cache
def checksums() -> list[Case]:
    """Whole blocks, a short last one, blocks of many pieces; data that begin at any byte."""
    rng = np.random.default_rng(0)
    cases = []
    for size, block, offset in (
        (1, 1, 0), (9, 9, 3), (127, 128, 0), (129, 128, 1), (5000, 4097, 2), (70001, 65536, 0), (140000, 140000, 0),
        (98304, 32768, 4), (33000, 33000, 5),
    ):  # fmt: skip
        data = rng.integers(0, 256, size).astype(np.uint8)
        want = np.array([of_bytes(data[i : i + block].tobytes()) for i in range(0, size, block)], np.int64)
        cases.append(Case("crc32c", [data, block, offset], want.view(np.uint8)))
    check = np.array([0xE3069283], np.int64)  # of "123456789", as every catalogue of checksums has it
    cases.append(Case("crc32c", [np.frombuffer(b"123456789", np.uint8), 9, 0], check.view(np.uint8)))
    long = np.zeros(40 * 32768 + 7, np.uint8)  # more pieces than a warp has lanes
    long[:5] = 255
    cases.append(Case("crc32c", [long, long.size, 0], np.array([of_bytes(long.tobytes())], np.int64).view(np.uint8)))
    return cases


def flat(*parts: Tensor) -> NDArray[np.uint8]:
    """Bytes of tensors, one behind the other."""
    return np.concatenate([bits(p).numpy() for p in parts])


def p7_encoders(x: Tensor) -> list[Case]:
    """The histogram by three thread blocks, and the encoder."""
    counts = reference_p7.p7_histogram(x)
    table = torch.from_numpy(pair_table(counts.numpy()))
    codes, planes, section, *escapes = reference_p7.p7_encode(x, table)
    kind = [bits(x).numpy(), int(NUMBERS[x.dtype]), x.element_size()]
    return [
        Case("p7_histogram", [*kind, 3], flat(counts)),
        Case("p7_encode", [*kind, table.numpy()], flat(codes, *planes, section, *escapes)),
    ]


def r8_encoders(x: Tensor) -> list[Case]:
    """The split, and histogram and stream of every plane."""
    planes, section = reference_r8.byte_split(x)
    kind = [bits(x).numpy(), int(NUMBERS[x.dtype]), x.element_size()]
    cases = [Case("byte_split", kind, flat(*planes, section))]
    for plane in planes:
        counts = reference_r8.byte_histogram(plane, x.numel())
        cases.append(Case("byte_histogram", [plane.numpy(), x.numel(), 3], flat(counts)))
        table = torch.from_numpy(frequencies(counts.numpy()))
        arguments = [plane.numpy(), table.numpy(), x.numel()]
        cases.append(Case("r8_encode", arguments, flat(*reference_r8.r8_encode(plane, table, x.numel()))))
    return cases


def hostile() -> list[Case]:
    """Random bytes, or ones, in every section: any numbers may come out, but nothing else is read or written."""
    cases = []
    for seed, dtype in enumerate(CODED * 2):
        x = mostly_normal(112 * 149, dtype, seed)  # a block and 304 numbers
        made = [lossless_blobs.r8(x, 149, (0, 1, 2))]
        if dtype in PAIRED:
            made.append(lossless_blobs.p7(x, 149))
        for blob, plan, _ in made:
            noise = uniform_bits(blob.numel(), torch.uint8, seed)
            for kind in Section:
                at, count = plan[PLAN_HEAD + 2 * kind : PLAN_HEAD + 2 * kind + 2]
                bad = blob.clone()
                bad[at : at + count] = noise[at : at + count] if seed < len(CODED) else 255
                if count:
                    size = dtype.itemsize
                    cases.append(Case("decode", [bad.numpy(), plan, 0, x.numel(), size], None))
                    cases.append(Case("rows", [bad.numpy(), plan, np.array([111, 0, 5]), size], None))
            cases.append(
                Case("decode", [torch.cat((blob[:64], noise[64:])).numpy(), plan, 0, x.numel(), dtype.itemsize], None)
            )
    return cases


def small_cases() -> list[Case]:
    """For the sanitizers: blobs end where their memory ends."""
    cases = checksums()[:6]
    for dtype in CODED:
        x = mostly_normal(16384 + 137, dtype)
        cases += [decoded(lossless_blobs.r8(x, coded=(0,))), *r8_encoders(x[:3000])]
        cases.append(gathered(lossless_blobs.r8(x[:3007], 31), torch.tensor([96, 0, 97, -1])))
        if dtype in PAIRED:
            cases += [decoded(lossless_blobs.p7(x)), decoded(lossless_blobs.p7(x), 77, 16400), *p7_encoders(x[:3000])]
            cases.append(gathered(lossless_blobs.p7(x[:3007], 31), torch.tensor([96, 0, 97, -1])))
            cases.append(decoded(lossless_blobs.p7(x[:8192], 256, Layout.TILES)))
    return cases
