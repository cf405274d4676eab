"""What prediction holds at a time."""

from __future__ import annotations

import pytest
import torch

import fastloss
from fastloss import predict
from fastloss.chunked import CHUNK_ROWS


def test_top_k_copies_a_chunk_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sizes, only_top = torch.randn(2000, 9), [], predict._only_top
    monkeypatch.setattr(predict, "_only_top", lambda z, k: sizes.append(len(z)) or only_top(z, k))
    whole = fastloss.row_sample(logits, seed=3, top_k=4)
    assert max(sizes) <= CHUNK_ROWS["cpu"] and sum(sizes) == 2000
    kept = torch.full_like(logits, -torch.inf).scatter(1, *reversed(logits.topk(4)))
    want = fastloss.row_sample(kept, seed=3)
    assert torch.equal(whole.index, want.index) and torch.equal(whole.logp, want.logp)
