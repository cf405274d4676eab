"""What tests/gpu_quant_checks.py checks on a device, on small operands on the CPU: the checks themselves are right."""

from __future__ import annotations

import pytest
import torch

import fastloss
import gpu_quant_checks as checks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def backend_of(op: str) -> str | None:
    """triton in the interpreter, where it has the op."""
    return "triton" if "triton" in fastloss.registry.backends(op) else None


def test_every_op() -> None:
    ran = checks.check_every_op(backend_of, "cpu", 5, 77, torch.float32)
    assert ran > 50 or backend_of("pack_bits") is None


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_products(backend: str) -> None:
    """bgemm and hamming_topk have no Triton kernel: the same checks, on the CPU's."""
    checks.check_bgemm(backend, "cpu", (5, 77, 33), "ternary", "3 bits")
    checks.check_hamming_topk(backend, "cpu", (5, 77, 33))
