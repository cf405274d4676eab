"""Variable trees: in which pairs of halves a circuit splits its variables."""

from __future__ import annotations

from collections.abc import Sequence

#: A leaf is the number of a variable, an inner node the pair (left, right).
Vtree = int | tuple["Vtree", "Vtree"]


def balanced_vtree(variables: Sequence[int]) -> Vtree:
    """The tree that halves the sequence again and again: depth ceil(log2 D).

    Raises ValueError for no variables.
    """
    if not variables:
        raise ValueError("a vtree needs at least one variable, got none")
    if len(variables) == 1:
        return int(variables[0])
    half = len(variables) // 2
    return balanced_vtree(variables[:half]), balanced_vtree(variables[half:])


def image_vtree(height: int, width: int) -> Vtree:
    """The tree that halves the longer side of an image again and again; pixel (i, j) is variable i width + j.

    Raises ValueError for an empty image.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel, got {height} x {width}")
    return _halves(0, height, 0, width, width)


def _halves(top: int, bottom: int, left: int, right: int, width: int) -> Vtree:
    if bottom - top == 1 and right - left == 1:
        return top * width + left
    if bottom - top >= right - left:
        middle = (top + bottom) // 2
        return _halves(top, middle, left, right, width), _halves(middle, bottom, left, right, width)
    middle = (left + right) // 2
    return _halves(top, bottom, left, middle, width), _halves(top, bottom, middle, right, width)


def leaves(vtree: Vtree) -> list[int]:
    """The variables, left to right: the order in which they are coded."""
    return [vtree] if isinstance(vtree, int) else leaves(vtree[0]) + leaves(vtree[1])
