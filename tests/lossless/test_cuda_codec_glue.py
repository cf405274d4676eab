"""The glue of the lossless codecs on CUDA, on CPU tensors: what runs on a GPU, with the kernels on the host behind `_C`."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import gpu_lossless_checks as checks
from cuda_host import build
from fastloss import backend_cuda
from fastloss.lossless import cuda_codec, cuda_encode
from lossless_cases import CODED, mostly_normal

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
int64, address = ctypes.c_int64, ctypes.c_void_p


class Extension:
    """The names of csrc/bindings_lossless_cuda.cpp, over lossless_passes_capi.cpp."""

    R8_SCRATCH = 64 + 2 * 16384

    def __init__(self) -> None:
        self.library = build.load(build.build(only="lossless_passes"))

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, name)(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def lossless_decode_cuda(self, *, blob: int, plan: list[int], first: int, count: int, out: int, **_: int) -> None:
        assert blob % 16 == 0
        c_plan = (int64 * len(plan))(*plan)
        self._call("c_lossless_decode", address(blob), c_plan, int64(first), int64(count), address(out))

    def lossless_rows_cuda(
        self, *, blob: int, plan: list[int], index: int, wide: bool, count: int, out: int, **_: int
    ) -> None:
        assert blob % 16 == 0
        c_plan = (int64 * len(plan))(*plan)
        wide_ = ctypes.c_bool(wide)
        self._call("c_lossless_rows", address(blob), c_plan, address(index), wide_, int64(count), address(out))

    def crc32c_pieces_cuda(self, size: int, block: int) -> int:
        return -(-size // block) * -(-block // 32768)

    def crc32c_cuda(self, *, data: int, size: int, block: int, pieces: int, out: int, **_: int) -> None:
        self._call("c_crc32c", address(data), int64(size), int64(block), address(out))

    def p7_histogram_cuda(self, *, numbers: int, numel: int, number: int, counts: int, **_: int) -> None:
        self._call("c_p7_histogram", address(numbers), int64(numel), number, address(counts), 2)

    def p7_encode_cuda(
        self, *, numbers: int, numel: int, number: int, table: int, codes_of: int, codes: int, bytes: list[int],
        bits: int, escapes: int, **_: int,
    ) -> None:  # fmt: skip
        planes = (address * 3)(*bytes)
        self._call(
            "c_p7_pass", ctypes.c_bool(False), address(numbers), int64(numel), number, address(table), address(codes_of),
            address(codes), planes, address(bits), address(escapes), None, None, None,
        )  # fmt: skip

    def p7_escapes_cuda(
        self, *, numbers: int, numel: int, number: int, codes: int, offsets: int, positions: int, values: int, **_: int
    ) -> None:
        self._call(
            "c_p7_pass", ctypes.c_bool(True), address(numbers), int64(numel), number, None, None, address(codes),
            (address * 3)(), None, None, address(offsets), address(positions), address(values),
        )  # fmt: skip

    def byte_split_cuda(
        self, *, numbers: int, numel: int, number: int, field: int, bytes: list[int], bits: int, **_: int
    ) -> None:
        planes = (address * 3)(*bytes)
        self._call("c_byte_split", address(numbers), int64(numel), number, address(field), planes, address(bits))

    def byte_histogram_cuda(self, *, plane: int, numel: int, counts: int, **_: int) -> None:
        self._call("c_byte_histogram", address(plane), int64(numel), address(counts), 2)

    def r8_encode_cuda(
        self, *, plane: int, numel: int, frequencies: int, scratch: int, lengths: int, literals: int, **_: int
    ) -> None:
        self._call(
            "c_r8_pass", ctypes.c_bool(False), address(plane), int64(numel), address(frequencies), address(scratch),
            address(lengths), address(literals), None, None,
        )  # fmt: skip

    def r8_move_cuda(self, *, scratch: int, numel: int, literals: int, offsets: int, data: int, **_: int) -> None:
        self._call(
            "c_r8_pass", ctypes.c_bool(True), None, int64(numel), None, address(scratch), None, address(literals),
            address(offsets), address(data),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the kernels on the host."""
    monkeypatch.setattr(backend_cuda, "_missing", lambda x: None)
    made = Extension()
    for module in (cuda_codec, cuda_encode):
        monkeypatch.setattr(module, "_C", made)
        monkeypatch.setattr(module, "place", lambda x: {"device": 0, "stream": 0})


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_decode_and_rows(dtype: torch.dtype) -> None:
    for made in checks.blobs(dtype, 129 * 30, 129):
        checks.check_decode("cuda", "cpu", made)
        checks.check_rows("cuda", "cpu", made)
    checks.check_hostile("cuda", "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_checked(dtype: torch.dtype) -> None:
    checks.check_tiles("cuda", "cpu", dtype)
    for made in checks.blobs(dtype, 16384 + 200):
        checks.check_checked("cuda", "cpu", made)


def test_crc32c() -> None:
    checks.check_crc32c("cuda", "cpu")


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_encoders(dtype: torch.dtype) -> None:
    checks.check_encoders("cuda", "cpu", mostly_normal(16384 + 129, dtype))
