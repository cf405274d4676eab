"""What tests of row_sample share: rows whose draw is known, and the test of a sample against a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.sampling import exponentials

INF = float("inf")
#: (seed, stream, column) of a number whose first 32 bits are 19: the 32 that follow decide its logarithm's third digit.
TAIL = (7, 599887, 58)


def tail_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, seed, streams, the columns to be drawn): two columns a row that only all 64 bits can tell apart.

    The row's E of column 58 is 19.6876 2^-32; 32 bits alone would make it 19.5 2^-32.
    """
    seed, stream, column = TAIL
    other = 3
    noise = -exponentials(torch.tensor(seed), torch.tensor([stream]), 64)[0].log()
    logits = torch.full((2, 64), -INF)
    logits[:, column] = 0
    tie = noise[column] - noise[other]
    logits[0, other], logits[1, other] = tie + 0.004, tie - 0.004  # the 32 bits are 0.0096 off
    return logits, torch.tensor(seed), torch.tensor([stream, stream]), torch.tensor([other, column])


def chi_square(counts: Tensor, p: Tensor) -> float:
    """Standard deviations of Pearson's statistic from its mean; columns expected fewer than 10 times are one cell."""
    expected = p.double() * counts.sum()
    many = expected >= 10
    cells = torch.cat([expected[many], expected[~many].sum()[None]])
    seen = torch.cat([counts[many].double(), counts[~many].sum()[None].double()])
    used = cells > 0
    assert (seen[~used] == 0).all(), "what has probability 0 was drawn"
    statistic = ((seen - cells)[used] ** 2 / cells[used]).sum()
    freedom = int(used.sum()) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5) if freedom else 0.0


def sample_rows(name: str, dtype: torch.dtype) -> Tensor:
    """Logits [5, V] of a kind that is hard for a sampler."""
    v = {"one class": 1, "odd width": 4099, "several parts": 40001}.get(name, 130)
    z = torch.randn(5, v) * 3
    if name == "offset":
        z += 1e4 if dtype != torch.float16 else 1e3
    elif name == "minus inf":
        z[:, ::3] = -INF
        z[0, 1:] = -INF
        z[1] = -INF
    elif name == "nan":
        z[1, 7] = torch.nan
        z[2, 7] = INF
    elif name == "flat":
        z[:] = 3.0
    elif name == "one huge":
        z[:, 7] = 500.0
    elif name == "rising":  # every block has a new maximum
        z = torch.arange(v).expand(5, v) * 0.25
    elif name == "very low":
        z -= 200.0
    z = z.to(dtype)
    if name == "unaligned":
        return torch.cat([z[:, :1], z], 1)[:, 1:]
    if name == "expanded":
        return z[:1].expand(5, v)
    return z


ROWS = ("plain", "one class", "odd width", "several parts", "offset", "minus inf", "nan", "flat", "one huge", "rising",
        "very low", "unaligned", "expanded")  # fmt: skip


def check_draw(
    index: Tensor, logp: Tensor, logits: Tensor, seed: Tensor, streams: Tensor, scale: float, cap: float
) -> None:
    """The drawn column has the largest key up to the rounding of fp32 scores, and logp is its log-softmax in float64."""
    z = logits.float() * scale
    z = cap * torch.tanh(z.double() / cap) if cap else z.double()
    z = z.masked_fill(logits == -INF, -INF)
    whole = z.isfinite().any(-1) & ~z.isnan().any(-1) & (z < INF).all(-1)
    assert torch.equal(index >= 0, whole) and torch.equal(logp.isnan(), ~whole)
    rows = whole.nonzero()[:, 0]
    if not len(rows):
        return
    z, index, logp = z[rows], index[rows, None], logp[rows].double()
    key = z - exponentials(seed, streams[rows], z.shape[1]).log()
    slack = 5e-6 + (2e-6 * cap if cap else 0.0)
    assert (key.gather(1, index)[:, 0] >= key.amax(-1) - slack).all()
    truth = z.log_softmax(-1).gather(1, index)[:, 0]
    torch.testing.assert_close(logp, truth, rtol=2e-6, atol=slack)
