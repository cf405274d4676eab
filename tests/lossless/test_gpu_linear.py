"""lossless_linear and dfloat11_decode on a GPU: against the decoded weights in fp64, and what was encoded; streams and graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastloss
from cuda_host.dfloat11_decode import Case, stream_of
from fastloss import lossless
from lossless_cases import mostly_normal

pytestmark = pytest.mark.gpu


def finite(rows: int, columns: int) -> torch.Tensor:
    """bf16 weights, one in sixteen of an odd exponent: many escapes."""
    w = torch.nan_to_num(mostly_normal(rows * columns, torch.bfloat16).float(), 0, 0, 0).clamp(-4, 4)
    return w.bfloat16().reshape(rows, columns).cuda()


def close(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> None:
    """Within a rounding to bf16 and fp32's errors of the sum."""
    wanted = x.double() @ w.double().T + bias.double()
    room = 2.0**-8 * wanted.abs() + 2.0**-18 * (x.double().abs() @ w.double().abs().T + wanted.abs())
    assert ((y.double() - wanted).abs() <= room).all()


@pytest.mark.parametrize("layout", ["rows", "tiles"])
@pytest.mark.parametrize("shape", [(16, 128), (4096, 4096), (1024, 8192), (8192, 1152)], ids=str)
def test_linear(shape: tuple[int, int], layout: str) -> None:
    w, bias = finite(*shape), torch.randn(shape[0], device="cuda").bfloat16()
    compressed = lossless.compress(w, codec="p7", layout=layout)
    for n in (1, 2, 8, 9, 16, 32, 33, 64):
        x = torch.randn(n, shape[1], device="cuda").bfloat16()
        arguments = (x, compressed.blob, compressed.plan, bias)
        assert fastloss.registry.choose("lossless_linear", *arguments) == "cuda"
        y = torch.ops.fastloss.lossless_linear(*arguments)
        close(y, x, w, bias)
        assert all(torch.equal(y, torch.ops.fastloss.lossless_linear(*arguments)) for _ in range(3))


def test_linear_in_a_graph() -> None:
    w, bias = finite(1024, 2048), torch.randn(1024, device="cuda").bfloat16()
    compressed = lossless.compress(w, codec="p7")
    x = torch.randn(4, 2048, device="cuda").bfloat16()
    torch.ops.fastloss.lossless_linear(x, compressed.blob, compressed.plan, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.fastloss.lossless_linear(x, compressed.blob, compressed.plan, bias)
    x.copy_(torch.randn(4, 2048, device="cuda"))
    graph.replay()
    close(y, x, w, bias)


@pytest.mark.parametrize("kind", ["normal", "long", "constant"])
@pytest.mark.parametrize("numel", [1, 300, 16385, 200_000])
def test_dfloat11(numel: int, kind: str) -> None:
    stream = stream_of(Case(numel, kind, 512))
    parts = (stream.luts, stream.codes, stream.sign_mantissa, stream.positions, stream.gaps)
    luts, *rest = (torch.from_numpy(p.view(np.uint8).copy()).cuda() for p in parts)
    with fastloss.use_backend("cuda"):
        found = torch.ops.fastloss.dfloat11_decode(luts.reshape(-1, 256), *rest, numel)
    assert np.array_equal(found.view(torch.int16).cpu().numpy().view(np.uint16), stream.bits)
