"""Small recipes: block partition (Q-VLM), QAT fraction, ReCU, dynamic sign (CSCE-Net)."""

from __future__ import annotations

import math

import pytest
import torch

from fastloss.quant.recipes import (
    activation_entropy,
    dynamic_sign,
    partition_blocks,
    qat_fraction,
    recu_tau,
    recu_weight,
)


def test_entropy() -> None:
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    x[0, 0, 1] = 0.0
    total = 0.0
    for row in x.reshape(-1, 6).tolist():
        whole = sum(abs(v) for v in row)
        total -= sum(abs(v) / whole * math.log(abs(v) / whole) for v in row if v)
    assert math.isclose(float(activation_entropy(x)), total / 12, rel_tol=1e-12)
    assert math.isclose(float(activation_entropy(torch.ones(2, 8))), math.log(8), rel_tol=1e-6)
    assert float(activation_entropy(torch.zeros(2, 8))) == 0.0
    with pytest.raises(ValueError, match="hold numbers"):
        activation_entropy(torch.zeros(0, 8))


def test_partition() -> None:
    falling = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    assert partition_blocks(falling) == [range(0, 1), range(1, 4), range(4, 7)]
    assert partition_blocks(falling, 0) == [range(0, 7)]
    # means 1, 1.5, 1.33, 2.25, ...: layers 1, 3 and 4 reach them
    values = [1.0, 2.0, 1.0, 5.0, 2.25, 1.0]
    assert partition_blocks(values, 0) == [range(0, 1), range(1, 3), range(3, 4), range(4, 6)]
    assert partition_blocks([1.0, 1.0, 1.0], 0) == [range(0, 1), range(1, 2), range(2, 3)]
    assert partition_blocks(torch.tensor([3.0]), 3) == [range(0, 1)]
    for values, words in (([], "a number for each layer"), ([1.0, math.nan], "a number for each layer")):
        with pytest.raises(ValueError, match=words):
            partition_blocks(values)
    with pytest.raises(ValueError, match="period must be >= 0"):
        partition_blocks([1.0], -1)


def test_qat_fraction() -> None:
    s = 1e12 / (1e9 * 4 / 8)
    assert math.isclose(qat_fraction(1e12, 1e9, 4), math.exp(math.log(s) - 6.7297 / math.log(s)) / s, rel_tol=1e-12)
    fractions = [qat_fraction(t, 1e9, 4) for t in (1e10, 1e11, 1e12, 1e14)]
    assert fractions == sorted(fractions) and 0.05 < fractions[0] < 0.15 and 0.5 < fractions[-1] < 0.7
    with pytest.raises(ValueError, match="more than one token"):
        qat_fraction(1e6, 1e9, 4)
    for arguments in ((0, 1, 1), (1, -1, 1), (1, 1, math.inf)):
        with pytest.raises(ValueError, match="positive finite"):
            qat_fraction(*arguments)


def test_recu() -> None:
    assert math.isclose(recu_tau(0.0), 0.85) and math.isclose(recu_tau(1.0), 0.99)
    a = (0.99 - 0.85) / (math.e - 1)
    assert math.isclose(recu_tau(0.4), a * math.exp(0.4) + 0.85 - a)
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 2"):
        recu_tau(2)
    w = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    for row in w.reshape(4, -1):
        u = (row - row.mean()) / (((row - row.mean()) ** 2).sum() / 14) ** 0.5 * 2 * math.sqrt(2)
        q = float(-u.abs().mean() * math.log(2 - 2 * 0.9))
        rows.append(u.clamp(-q, q))
    expected = torch.stack(rows).reshape(4, 3, 5)
    ours = recu_weight(w, 0.9)
    assert torch.allclose(ours, expected, rtol=1e-12) and bool((ours.abs() < expected.abs().amax()).any())
    weight = torch.randn(4, 3, 5, dtype=torch.float64)
    grads = [torch.autograd.grad((y * weight).sum(), w)[0] for y in (ours, expected)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"tau must be in \[0\.5, 1\), got 1"):
        recu_weight(w, 1.0)
    with pytest.raises(ValueError, match="two numbers a row"):
        recu_weight(torch.randn(4, 1), 0.9)


def test_dynamic_sign() -> None:
    v = torch.tensor([[0.5, 0.2, -0.004, 0.003, 0.3], [-0.5, -0.2, 0.004, -0.0, -0.3]])
    assert dynamic_sign(v, 0.01).tolist() == [[1, 1, -1, -1, 1], [-1, -1, 1, 1, -1]]
    assert dynamic_sign(v, 0.0).tolist() == [[1, 1, -1, 1, 1], [-1, -1, 1, 1, -1]]  # -0.0 is +1
    assert torch.equal(
        dynamic_sign(v, torch.tensor([0.01, -0.01])), torch.stack((dynamic_sign(v, 0.01)[0], dynamic_sign(v, 0.0)[1]))
    )
    assert dynamic_sign(torch.tensor([torch.nan, 1.0]), 0.1).tolist() == [-1, 1]
    assert dynamic_sign(torch.tensor([0.5, 2.0]), 1.0, limit=1.0).tolist() == [-1, 1]
    assert dynamic_sign(torch.tensor([0.5, 2.0]), 1.0).tolist() == [1, 1]  # the threshold is no more than 0.01
    even = torch.tensor([0.001, 1.0, 1.0, -1.0, -1.0, -1.0])
    assert dynamic_sign(even, 0.01).tolist() == [1, 1, 1, -1, -1, -1]  # three of six: not more than half
    with pytest.raises(ValueError, match=r"\[2\], got \[3\]"):
        dynamic_sign(v, torch.zeros(3))
    with pytest.raises(TypeError, match="floating"):
        dynamic_sign(v.long(), 0.1)
    with pytest.raises(ValueError, match="one number"):
        dynamic_sign(torch.tensor(1.0), 0.1)
