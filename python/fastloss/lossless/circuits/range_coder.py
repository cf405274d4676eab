"""A range coder of whole numbers: 32-bit range, carries through a held-back byte."""

from __future__ import annotations

BITS = 16  # of a frequency: all frequencies of a symbol's table sum to 2^16
_TOP = 1 << 24
_MASK = (1 << 32) - 1


class RangeEncoder:
    """Symbols by (first slot, slots) of 2^16 to bytes."""

    def __init__(self) -> None:
        self._low, self._range, self._held, self._run = 0, _MASK, 0, 1
        self._out = bytearray()

    def encode(self, start: int, size: int) -> None:
        """Append a symbol that owns the slots start..start+size."""
        part = self._range >> BITS
        self._low += start * part
        self._range = size * part
        while self._range < _TOP:
            self._range = self._range << 8 & _MASK
            self._shift()

    def _shift(self) -> None:
        """Move the top byte of `low` out; a run of 255s waits until it is known whether a carry comes."""
        if self._low < 0xFF000000 or self._low > _MASK:
            carry = self._low >> 32
            self._out.append(self._held + carry & 255)
            self._out.extend(bytes([255 + carry & 255]) * (self._run - 1))
            self._held, self._run = self._low >> 24 & 255, 0
        self._run += 1
        self._low = (self._low & 0x00FFFFFF) << 8

    def finish(self) -> bytes:
        """The bytes of all symbols."""
        for _ in range(5):
            self._shift()
        return bytes(self._out[1:]).rstrip(b"\0")  # the first is always 0; the decoder reads zeros beyond the end


class RangeDecoder:
    """Bytes back to slots; beyond the end it reads zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._range, self._code = data, 4, _MASK, int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def slot(self) -> int:
        """A slot of the next symbol."""
        return min(self._code // (self._range >> BITS), (1 << BITS) - 1)

    def advance(self, start: int, size: int) -> None:
        """Go on behind the symbol that owns start..start+size."""
        part = self._range >> BITS
        self._code -= start * part
        self._range = size * part
        while self._range < _TOP:
            byte = self._data[self._at] if self._at < len(self._data) else 0
            self._at += 1
            self._code = (self._code << 8 | byte) & _MASK
            self._range = self._range << 8 & _MASK
