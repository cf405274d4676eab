"""The Fréchet mean of a prediction over a metric space of labels, against the sum written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import frechet

INF = float("inf")


def truth(p: Tensor, distances: Tensor) -> Tensor:
    return (p.double()[:, None, :] * distances.double().square()[None]).sum(-1).argmin(-1)


def grid(labels: int) -> Tensor:
    """Distances between points of a plane."""
    points = torch.rand(labels, 2, generator=torch.Generator().manual_seed(1))
    return torch.cdist(points, points)


@pytest.mark.parametrize("labels, v", [(40, 40), (300, 25), (1, 7), (5, 1)])
def test_equals_the_sum(labels: int, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "_LABELS", 16)
    monkeypatch.setattr(frechet, "_BLOCK", 64)
    d = grid(max(labels, v))[:labels, :v]
    z = torch.randn(11, v) * 3
    want = truth(z.double().softmax(-1), d)
    assert torch.equal(fastloss.frechet_mean(z, d), want)
    assert torch.equal(fastloss.frechet_mean(z, d.square(), squared=True), want)
    assert torch.equal(fastloss.frechet_mean(z.softmax(-1), d, probabilities=True), want)
    assert torch.equal(fastloss.frechet_mean(z * 2, d, temperature=2.0), want)
    assert torch.equal(fastloss.frechet_mean(z.double(), d), want)


def test_labels_without_an_output_are_predicted() -> None:
    """On a line, half the mass on each end: the middle, which no output stands for."""
    d = (torch.arange(5)[:, None] - torch.tensor([0, 4])[None]).abs()
    assert fastloss.frechet_mean(torch.zeros(3, 2), d).tolist() == [2] * 3


def test_the_discrete_metric_gives_the_argmax() -> None:
    z = torch.randn(9, 30)
    assert torch.equal(fastloss.frechet_mean(z, 1 - torch.eye(30)), z.argmax(-1))


def test_linear() -> None:
    x, w, b, d = torch.randn(2, 9, 6), torch.randn(25, 6), torch.randn(25), grid(60)[:, :25]
    z = 5 * torch.tanh(0.7 * (x @ w.T + b).double() / 5) / 0.5
    got = fastloss.linear_frechet_mean(
        x, w, d, linear_bias=b, softcap=5.0, logit_scale=0.7, temperature=0.5, max_extra_bytes=300
    )
    assert torch.equal(got, truth(z.softmax(-1).reshape(18, 25), d).reshape(2, 9))
    assert fastloss.linear_frechet_mean(x[:, :0], w, d).shape == (2, 0)


def test_offsets_and_rows_without_a_distribution() -> None:
    z, d = torch.randn(4, 20), grid(20)
    want = fastloss.frechet_mean(z, d)
    assert torch.equal(fastloss.frechet_mean((z.double() + 1e4), d), want)
    z[1, 3], z[2] = torch.nan, -INF
    assert fastloss.frechet_mean(z, d).tolist() == [int(want[0]), -1, -1, int(want[3])]


@pytest.mark.parametrize(
    "distances, error, says",
    [
        (torch.ones(3, 4), ValueError, r"\[M, 5\]"),
        (torch.ones(0, 5), ValueError, "M > 0"),
        (torch.ones(5), ValueError, r"\(5,\)"),
        (torch.ones(3, 5, dtype=torch.bool), TypeError, "bool"),
    ],
)
def test_errors(distances: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fastloss.frechet_mean(torch.randn(2, 5), distances)
    with pytest.raises(error, match=says):
        fastloss.linear_frechet_mean(torch.randn(2, 3), torch.randn(5, 3), distances)


def test_a_label_out_of_reach() -> None:
    """p = 0 times an infinite distance is NaN, which must not hide the other labels of its block."""
    z, d = torch.tensor([[-200.0, 0.0, 1.0, 2.0]]), torch.rand(70, 4)
    d[3, 0] = INF
    without = d.clone()
    without[3] = 1e6
    assert torch.equal(fastloss.frechet_mean(z, d), fastloss.frechet_mean(z, without))


def test_autocast_does_not_round() -> None:
    generator = torch.Generator().manual_seed(0)
    z, d = torch.randn(400, 50, generator=generator), torch.rand(300, 50, generator=generator)
    want = fastloss.frechet_mean(z, d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastloss.frechet_mean(z, d), want)
