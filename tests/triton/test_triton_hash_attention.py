"""`hash_attention` of the Triton backend, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastloss import registry

#: batch and heads, queries, keys, bits, columns of v: less than a tile, several of each kind, one of each
SHAPES = ((1, 1, 1, 1, 1), (2, 66, 66, 16, 24), (1, 70, 70, 70, 66), (1, 5, 600, 9, 3), (2, 130, 3, 16, 20))


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    g, n, m, bits, columns = shape
    q, k = (torch.randint(0, 2, (g, t, bits)).to(dtype) * 2 - 1 for t in (n, m))
    return [q, k, torch.randn(g, m, columns).to(dtype)]


def run(backend: str, op: str, *args: object) -> tuple[Tensor, ...]:
    with registry.use_backend(backend):
        return getattr(torch.ops.fastloss, op).default(*args)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)], ids=str
)
def test_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = operands(shape, dtype)
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    for own, causal in (
        [(o, c) for o in (False, True) for c in (False, True)] if shape[1] == shape[2] else [(False, False)]
    ):
        out, d = run("reference", "hash_attention", *given, own, causal)
        got, got_d = run("triton", "hash_attention", *given, own, causal)
        torch.testing.assert_close(got, out, **close)
        torch.testing.assert_close(got_d, d, rtol=0, atol=0)
        grad = torch.randn(out.shape).to(dtype)
        for needs in (7, 1, 2, 4) if shape[0] == 2 and not own else (7,):
            args = (grad, *given, out, d, own, causal, needs)
            for a, b in zip(
                run("triton", "hash_attention_backward", *args),
                run("reference", "hash_attention_backward", *args),
                strict=True,
            ):
                torch.testing.assert_close(a, b, **close)
