"""Fixtures shared by all tests, and the rule for what runs where."""

from __future__ import annotations

import os

import pytest
import torch

from fastloss import compiled


def pytest_sessionstart() -> None:
    """Without the extension most tests would compare torch with itself; FASTLOSS_PURE=1 says that this is meant."""
    if compiled.MISSING and os.environ.get("FASTLOSS_PURE") != "1":
        pytest.exit(compiled.MISSING, returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(
                    pytest.mark.skip(reason="needs a CUDA device; run `make device-check` where there is one")
                )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
