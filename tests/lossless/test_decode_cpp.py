"""The C++ decoders against the reference: what the reference encodes must come back, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless import compress, header, reference
from fastloss.lossless.compressed_tensor import CompressedTensor
from fastloss.lossless.contract import BLOCK, PLAN_HEAD, Codec, Section
from fastloss.lossless.cpp_decode import crc32c, lossless_decode, lossless_decode_checked, lossless_rows
from lossless_cases import CODED, INTEGERS, SIZES, bits, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}")
ISAS = range(0 if _C is None else _C.best_isa() + 1)
P7 = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Every instruction set of this machine."""
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    yield request.param
