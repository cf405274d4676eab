"""What can be wrong with compressed bytes."""

from __future__ import annotations


class FormatError(ValueError):
    """Not a fastloss blob or file, or one of a major version that this release does not read."""


class CorruptError(ValueError):
    """Compressed bytes that are damaged: nothing was decoded from them.

    Attributes:
        tensor: the tensor's name, or None where a blob stands alone.
        block: the number of the first damaged block (16,384 numbers each), or None where the damage is not in a block.
    """

    def __init__(self, reason: str, tensor: str | None = None, block: int | None = None) -> None:
        self.reason, self.tensor, self.block = reason, tensor, block
        where = "" if tensor is None else f"tensor {tensor!r}"
        if block is not None:
            where += f"{', ' if where else ''}block {block}"
        super().__init__(f"{where}: {reason}" if where else reason)

    def within(self, tensor: str) -> CorruptError:
        """The same error, of the tensor of this name."""
        return CorruptError(self.reason, tensor, self.block)

    def __reduce__(self) -> tuple[type[CorruptError], tuple[str, str | None, int | None]]:
        return CorruptError, (self.reason, self.tensor, self.block)
