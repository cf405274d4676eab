"""What tests/gpu_pair_checks.py checks on a device, on tiny operands in the interpreter: the checks themselves are right."""

from __future__ import annotations

import pytest
import torch

import fastloss
import gpu_pair_checks as checks
from fastloss.contract import PairFunction
from triton_pair_problem import features, operands

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stats_and_map(dtype: torch.dtype) -> None:
    p = checks.on(operands(5, 77, 33, dtype, **features("ids and all else", 5, 77)), "cpu")
    checks.check_stats(p)
    checks.check_map(p, PairFunction.SIGMOID)


def test_topk() -> None:
    checks.check_topk(operands(5, 77, 33, **features("two diagonals", 5, 77)), 10, 3)


def test_edges() -> None:
    checks.check_edges("triton", 5, 77, 33, 40, torch.bfloat16, "cpu")


def test_rows_of_a_large_batch() -> None:
    q, k = (torch.nn.functional.normalize(torch.randn(70, 16), dim=1) for _ in range(2))
    with fastloss.use_backend("triton"):
        checks.check_large(q, k, torch.tensor([0, 35, 69]))
