"""Arithmetic coding by probabilistic circuits (fastloss.lossless.circuits)."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
import zstandard
from PIL import Image
from sklearn.datasets import load_digits

from fastloss.lossless import CorruptError, FormatError, circuits
from fastloss.lossless.circuits.range_coder import BITS, RangeDecoder, RangeEncoder
from fastloss.lossless.circuits.vtree import leaves


def _brute(circuit: circuits.Circuit, row: list[int]) -> float:
    """p(row) by the definition: v = W (left * right), no logarithms, no rescaling."""
    place = itertools.count()

    def up(node: circuits.Vtree) -> torch.Tensor:
        if isinstance(node, int):
            return circuit.leaf[node][:, row[node]]
        weight = circuit.weight[next(place)]
        left = up(node[0])
        return weight @ (left * up(node[1]))

    root = up(circuit.vtree)
    return float(root[0] if not isinstance(circuit.vtree, int) else circuit.weight[0][0] @ root)


@pytest.mark.parametrize("vtree", [0, (0, 1), ((2, 0), (1, 3)), circuits.balanced_vtree([4, 2, 0, 1, 3])])
def test_a_circuit_is_a_distribution(vtree: circuits.Vtree) -> None:
    circuit = circuits.Circuit(vtree, hidden=3, values=3, seed=1)
    every = torch.cartesian_prod(*[torch.arange(3)] * circuit.variables).reshape(-1, circuit.variables)
    p = circuit.log_likelihood(every).exp()
    assert abs(float(p.sum()) - 1) < 1e-12
    for row, value in zip(every.tolist(), p.tolist(), strict=True):
        assert value == pytest.approx(_brute(circuit, row), rel=1e-12)


def test_code_length_is_the_likelihood() -> None:
    circuit = circuits.Circuit(circuits.image_vtree(5, 7), hidden=4, values=11, seed=2)
    data = torch.randint(0, 11, (200, 35), generator=torch.Generator().manual_seed(0))
    code = circuits.encode(circuit, data)
    ideal = -float(circuit.log_likelihood(data).sum()) / math.log(2)
    assert torch.equal(circuits.decode(circuit, code), data)
    # 16-bit tables take 11 of 65536 slots from their values' shares: under 0.001 bit a symbol; then header and last bytes.
    assert ideal - 1 <= 8 * len(code) <= ideal + 0.001 * data.numel() + 8 * 24


def test_rows_decode_whatever_their_number() -> None:
    """The sums of the conditionals do not depend on how many rows are coded at once."""
    circuit = circuits.Circuit(circuits.balanced_vtree(range(9)), hidden=8, values=5, seed=3)
    data = torch.randint(0, 5, (37, 9), generator=torch.Generator().manual_seed(1))
    for rows in (data[:0], data[:1], data[3:5], data):
        assert torch.equal(circuits.decode(circuit, circuits.encode(circuit, rows)), rows)


def test_digits_against_png_and_zstd() -> None:
    """397 digits that the circuit has not seen, in bits a pixel: below zstd of all of them and one PNG of all of them."""
    digits = torch.from_numpy(load_digits().data).long()
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    train, test = digits[:1400], digits[1400:]
    circuit = circuits.fit(train, circuits.image_vtree(8, 8), 17, hidden=8, epochs=10)
    code = circuits.encode(circuit, test)
    assert torch.equal(circuits.decode(circuit, code), test)
    raw = test.to(torch.uint8)
    png = io.BytesIO()
    Image.fromarray(raw.reshape(-1, 8).numpy()).save(png, "PNG", optimize=True)
    zstd = zstandard.ZstdCompressor(22).compress(raw.numpy().tobytes())
    assert len(code) < 0.8 * len(zstd) < 0.8 * len(png.getvalue())
    assert 8 * len(code) / test.numel() < 2.25


def test_learning_rises() -> None:
    data = torch.randint(0, 2, (300, 1), generator=torch.Generator().manual_seed(4)).repeat(1, 6)  # all pixels equal
    circuit = circuits.fit(data, circuits.balanced_vtree(range(6)), 2, hidden=4, epochs=20, smoothing=1e-3)
    assert float(-circuit.log_likelihood(data).mean()) < 0.75 < 6 * math.log(2)  # log 2 is the least possible


def test_damage_and_other_circuits_are_found() -> None:
    circuit = circuits.Circuit(circuits.balanced_vtree(range(8)), hidden=3, values=4, seed=5)
    data = torch.randint(0, 4, (50, 8), generator=torch.Generator().manual_seed(2))
    code = circuits.encode(circuit, data)
    for place in range(16, len(code), 7):
        with pytest.raises(CorruptError):
            circuits.decode(circuit, code[:place] + bytes([code[place] ^ 64]) + code[place + 1 :])
    with pytest.raises(CorruptError):
        circuits.decode(circuit, code[: len(code) // 2])
    with pytest.raises(CorruptError):
        circuits.decode(circuits.Circuit(circuit.vtree, 3, 4, seed=6), code)
    with pytest.raises(CorruptError):  # a count that no code of this length can hold
        circuits.decode(circuit, code[:4] + b"\xff\xff\xff\xff" + code[8:])
    with pytest.raises(FormatError):
        circuits.decode(circuit, b"PNG" + code)
    with pytest.raises(FormatError):
        circuits.decode(circuits.Circuit((0, 1), 3, 4), code)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        circuits.image_vtree(0, 3)
    with pytest.raises(ValueError, match="at least one variable"):
        circuits.balanced_vtree([])
    with pytest.raises(ValueError, match="once"):
        circuits.Circuit((0, 0), 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        circuits.Circuit((0, 1), 0, 2)
    circuit = circuits.Circuit((0, 1), 2, 2)
    with pytest.raises(TypeError, match="integers"):
        circuits.encode(circuit, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        circuits.encode(circuit, torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        circuits.encode(circuit, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one row"):
        circuits.fit(torch.zeros(0, 2, dtype=torch.int64), (0, 1), 2)


def test_range_coder_carries() -> None:
    """Long runs of the same rare or frequent symbol, in which carries ripple."""
    last = (1 << BITS) - 1
    symbols = [(last, 1)] * 300 + [(0, last)] * 3000 + [(last, 1), (0, 1)] * 200 + [(0, 1)] * 100
    coder = RangeEncoder()
    for start, size in symbols:
        coder.encode(start, size)
    decoder = RangeDecoder(coder.finish())
    for start, size in symbols:
        assert start <= decoder.slot() < start + size
        decoder.advance(start, size)


def test_image_vtree_halves_the_longer_side() -> None:
    assert circuits.image_vtree(2, 2) == ((0, 1), (2, 3))
    assert leaves(circuits.image_vtree(1, 4)) == [0, 1, 2, 3]
    assert sorted(leaves(circuits.image_vtree(5, 3))) == list(range(15))
