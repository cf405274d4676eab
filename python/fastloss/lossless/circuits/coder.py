"""Data to bytes and back by the conditionals of a circuit.

Variables are coded left to right through the vtree. Let g be the gradient of the root by a node's values, with the
variables to the left at what they are and those to the right summed out (a node of unseen variables is 1). At a leaf
g theta is the joint of its value and all before it; dividing by its sum gives the conditional. Going down, g W is the
gradient by the products: times 1 for the left child, times the left child's values for the right one. Every matrix is used
twice, so that all D conditionals cost O(|p|) together, and one of them O(|p| log D / D) on a balanced tree.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..crc32c_table import of_bytes
from ..errors import CorruptError, FormatError
from .circuit import Circuit, check_data
from .range_coder import BITS, RangeDecoder, RangeEncoder
from .vtree import Vtree

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"FLPC"


def encode(circuit: Circuit, data: Tensor) -> bytes:
    """The rows of `data` (integers [N, D]) as bytes, about -log2 p(x) bits a row.

    Decoding repeats the float64 arithmetic of encoding and so wants the same machine type and torch.

    Raises TypeError or ValueError where the circuit cannot hold the data; ValueError for a circuit of over 2^15 values.
    """
    check_data(circuit, data)
    _check_values(circuit)
    rows = data.to(torch.int64).cpu()
    coder = RangeEncoder()

    def one(variable: int, starts: np.ndarray) -> Tensor:
        symbols = rows[:, variable].numpy()
        low = np.take_along_axis(starts, symbols[:, None], 1)[:, 0]
        high = np.take_along_axis(starts, symbols[:, None] + 1, 1)[:, 0]
        for start, end in zip(low.tolist(), high.tolist(), strict=True):
            coder.encode(start, end - start)
        return rows[:, variable]

    _walk(circuit, len(rows), one)
    return _HEADER.pack(_MAGIC, len(rows), circuit.variables, of_bytes(_raw(rows))) + coder.finish()


def decode(circuit: Circuit, code: bytes) -> Tensor:
    """The rows (int64 [N, D]) that `encode` made these bytes of, with the same circuit.

    Raises FormatError for other bytes or a circuit of other variables, CorruptError where the rows' checksum is wrong: damaged
    bytes, or another circuit.
    """
    _check_values(circuit)
    if len(code) < _HEADER.size or code[:4] != _MAGIC:
        raise FormatError(f"not a circuit's code: it begins with {code[:4]!r}, not {_MAGIC!r}")
    _, count, variables, crc = _HEADER.unpack_from(code)
    if variables != circuit.variables:
        raise FormatError(f"this code is of {variables} variables, the circuit has {circuit.variables}")
    # A symbol costs 2^-16 of a byte at least, so no honest code holds more rows than this.
    if count * variables > (len(code) + 8) << BITS:
        raise CorruptError(f"{len(code)} bytes cannot hold {count} rows")
    coder = RangeDecoder(code[_HEADER.size :])
    rows = torch.zeros(count, variables, dtype=torch.int64)

    def one(variable: int, starts: np.ndarray) -> Tensor:
        for n, table in enumerate(starts):
            symbol = int(np.searchsorted(table, coder.slot(), side="right")) - 1
            coder.advance(int(table[symbol]), int(table[symbol + 1] - table[symbol]))
            rows[n, variable] = symbol
        return rows[:, variable]

    _walk(circuit, count, one)
    if of_bytes(_raw(rows)) != crc:
        raise CorruptError("the checksum of the rows is wrong: damaged bytes, or not the circuit that coded them")
    return rows


def _check_values(circuit: Circuit) -> None:
    if circuit.values > 1 << (BITS - 1):
        raise ValueError(f"a table of 2^{BITS} slots takes up to 2^{BITS - 1} values, got {circuit.values}")


def _raw(rows: Tensor) -> bytes:
    return rows.to(torch.int32).contiguous().numpy().tobytes()


def _walk(circuit: Circuit, count: int, one: Callable[[int, np.ndarray], Tensor]) -> None:
    """Call `one(variable, first slots [N, V + 1])` in coding order; it returns the values of the N rows."""
    place = iter(range(len(circuit.weight)))

    def visit(node: Vtree, gradient: Tensor) -> Tensor:
        if isinstance(node, int):
            theta = circuit.leaf[node]
            return theta.t()[one(node, _starts(_times(gradient, theta)))]
        weight = circuit.weight[next(place)]
        products = _times(gradient, weight)
        left = visit(node[0], products)
        right = visit(node[1], _scaled(products * left))
        return _scaled(_times(left * right, weight.t()))

    root = torch.ones(count, 1, dtype=torch.float64)
    if isinstance(circuit.vtree, int):
        root = _times(root, circuit.weight[0])
    visit(circuit.vtree, root)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, summed in one order whatever the number of rows, so that a row decodes as it was encoded."""
    total = x[:, :1] * matrix[:1]
    for k in range(1, matrix.shape[0]):
        total = total + x[:, k : k + 1] * matrix[k : k + 1]
    return total


def _scaled(x: Tensor) -> Tensor:
    """The same direction, its largest entry 1: conditionals do not depend on the length, float64's range does."""
    return x / x.amax(1, keepdim=True).clamp(min=1e-300)


def _starts(joint: Tensor) -> np.ndarray:
    """First slots [N, V + 1] of 2^16: every value has at least one."""
    values = joint.shape[1]
    share = (joint / joint.sum(1, keepdim=True).clamp(min=1e-300)).nan_to_num(0).numpy()
    slots = np.floor(share * ((1 << BITS) - values)).astype(np.int64) + 1
    slots[np.arange(len(slots)), share.argmax(1)] += (1 << BITS) - slots.sum(1)
    return np.pad(slots.cumsum(1), ((0, 0), (1, 0)))
