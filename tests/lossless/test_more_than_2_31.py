"""More than 2^31 numbers: 12 GB of memory and a minute each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import lossless
from lossless_cases import bits, normal

COUNT = (1 << 31) + 3 * 16384 + 77


def _numbers(dtype: torch.dtype) -> Tensor:
    """A pattern whose length shares no factor with a block's, so that a block in the wrong place is seen."""
    pattern = normal((1 << 20) + 7, dtype)
    integers = pattern.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    return integers.repeat(-(-COUNT // integers.numel()))[:COUNT].view(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "dtype"), [("p7", torch.bfloat16), ("r8", torch.float8_e5m2), ("raw", torch.float8_e5m2)]
)
def test_more_than_2_31(codec: str, dtype: torch.dtype) -> None:
    x = _numbers(dtype)
    packed = lossless.compress(x, codec)
    assert packed.codec.name.lower() == codec and (
        codec == "raw" or packed.nbytes < 0.75 * x.numel() * x.element_size()
    )
    for first in ((1 << 31) - 5, (1 << 31) + 16384 - 1, COUNT - 100):
        part = torch.ops.fastloss.lossless_decode(packed.blob, packed.plan, first, 100, dtype)
        assert torch.equal(bits(part), bits(x[first : first + 100]))
    assert torch.equal(bits(packed.block(131074)), bits(x[131074 * 16384 :][:16384]))
    out = packed.decompress()
    for first in range(0, COUNT, 1 << 27):
        assert torch.equal(bits(out[first : first + (1 << 27)]), bits(x[first : first + (1 << 27)]))
    packed.blob[packed.nbytes // 2] ^= 1
    with pytest.raises(lossless.CorruptError):
        packed.verify()


@pytest.mark.slow
def test_rows_of_more_than_2_31() -> None:
    columns = 4096
    x = _numbers(torch.bfloat16)[: COUNT // columns * columns].reshape(-1, columns)
    packed = lossless.compress(x, "p7")
    index = torch.tensor([0, x.shape[0] - 1, (1 << 31) // columns, (1 << 31) // columns - 1])
    assert torch.equal(bits(packed.rows(index)), bits(x[index]))
