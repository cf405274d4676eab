"""Class ids on a GPU: kernels never index with a bad one (the row becomes NaN); a device-side check can be turned on."""

from __future__ import annotations

import os

import torch
from torch import Tensor

_enabled = os.environ.get("FASTLOSS_CHECK_TARGETS", "0") == "1"


def check_device_targets(enabled: bool = True) -> None:
    """Turn the device-side check of class ids on or off (also FASTLOSS_CHECK_TARGETS=1).

    On, a class id out of range stops the stream with a device assertion, as in torch. Off, which is the default, its row's
    loss and gradient are NaN and nothing is read out of bounds. Neither synchronises with the host.
    """
    global _enabled
    _enabled = bool(enabled)


def check_targets(target: Tensor | None, classes: int, ignore_index: int) -> None:
    """Assert on the device that every class id is in [0, classes) or ignore_index, if the check is on."""
    if _enabled and target is not None and target.numel():
        good = ((target >= 0) & (target < classes)) | (target == ignore_index)
        torch._assert_async(
            good.all(), f"fastloss: a class id is not in 0..{classes - 1} nor ignore_index {ignore_index}"
        )


def check_listed(listed: Tensor | None, columns: int, ignore_index: int) -> None:
    """Assert on the device that every listed column is below `columns`, negative or ignore_index, if the check is on."""
    if _enabled and listed is not None and listed.numel():
        good = (listed < columns) | (listed == ignore_index)
        torch._assert_async(
            good.all(),
            f"fastloss: a listed column is not in 0..{columns - 1}, negative or ignore_index {ignore_index}",
        )
