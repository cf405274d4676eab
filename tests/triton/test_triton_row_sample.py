"""row_sample of the Triton backend, interpreted: the draw that the noise of docs/design.md says, and its log-probability."""

from __future__ import annotations

import pytest
import torch
from fastloss.triton_kernels import row_sample as kernels

import fastloss
from sampling import ROWS, check_draw, sample_rows, tail_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of -inf - -inf and log 0
LAUNCHES = pytest.mark.parametrize("block, splits", [(None, None), (64, 2)], ids=["default", "small"])


@LAUNCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "several parts"])
def test_draws(name: str, dtype: torch.dtype, block: int | None, splits: int | None) -> None:
    z, streams, seed = sample_rows(name, dtype)[:, :260], torch.tensor([0, 5, -1, 1 << 40, 7]), torch.tensor(-3)
    for scale, cap in ((1.0, 0.0), (0.7, 20.0))[: 2 if name in ("plain", "minus inf", "nan") else 1]:
        index, logp = kernels.row_sample(z, seed, streams, scale, cap, block=block, splits=splits)
        check_draw(index, logp, z, seed, streams, scale, cap)


@LAUNCHES
def test_the_tail_has_64_bits(block: int | None, splits: int | None) -> None:
    logits, seed, streams, drawn = tail_rows()
    index, _ = kernels.row_sample(logits, seed, streams, 1.0, 0.0, block=block, splits=splits)
    assert torch.equal(index, drawn)


def test_a_long_row() -> None:
    z, seed, streams = torch.randn(1, 9_001), torch.tensor(5), torch.tensor([9])
    check_draw(*kernels.row_sample(z, seed, streams, 1.0, 0.0), z, seed, streams, 1.0, 0.0)


def test_public_function_draws_as_the_other_backends() -> None:
    x, w = torch.randn(6, 8), torch.randn(300, 8)
    drawn = []
    for backend in ("triton", "cpp", "reference"):
        with fastloss.use_backend(backend):
            drawn.append(fastloss.row_sample(x @ w.T, seed=4, temperature=0.8))
    for other in drawn[1:]:
        assert torch.equal(drawn[0].index, other.index)
        torch.testing.assert_close(drawn[0].logp, other.logp, rtol=2e-6, atol=2e-6)


def test_no_rows() -> None:
    index, logp = kernels.row_sample(torch.empty(0, 7), torch.tensor(1), torch.empty(0, dtype=torch.int64), 1.0, 0.0)
    assert index.shape == logp.shape == (0,)
