"""Fixtures shared by all tests, and the rule for what runs where."""

from __future__ import annotations

import pytest
import torch


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
