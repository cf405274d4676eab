"""From one value a row to a loss."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "mean_valid", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Raise ValueError for a reduction that is none."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduce(values: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    """`values` [...] by "mean" (over all rows, those that are not valid count 0), "mean_valid" (over the valid ones; 0 where
    there is none), "sum", or "none". What is not valid is 0 in all of them and has no gradient; valid None: all are."""
    check_reduction(reduction)
    if valid is not None:
        values = values.masked_fill(~valid, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean_valid" and valid is not None:
        return values.sum() / valid.sum().clamp(min=1)
    return values.mean()
