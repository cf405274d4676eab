"""dfloat11_decode.cu on the host, in several thread orders, against what was encoded; and the glue of its backend around it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastloss
from cuda_host import build
from cuda_host.dfloat11_decode import Case, CDfloat11, Stream, decode, run, small_cases, stream_of
from fastloss import backend_cuda
from fastloss.lossless import cuda_dfloat11

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
ORDERS = ("asc", "desc", "7")


@pytest.fixture(params=ORDERS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build(only="dfloat11_decode")


@pytest.mark.parametrize("number", range(len(small_cases())))
def test_small_cases(library: Path, number: int) -> None:
    run(library, small_cases()[number])


@pytest.mark.parametrize("kind", ["normal", "long", "constant"])
@pytest.mark.parametrize("threads", [32, 96, 512])
def test_sizes(kind: str, threads: int) -> None:
    """Ends at every bit of a byte and a thread."""
    for numel in (1, 2, 3, 7, 8, 9, 20, 21, 22, 23, 24, 25, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 16385):
        run(build.build(only="dfloat11_decode"), Case(numel, kind, threads))


def test_every_pattern() -> None:
    """All 65,536 patterns: 256 exponents, those from 240 on among them, with one table and no longer code than 8 bits."""
    bits = np.arange(65536).astype(np.uint16)
    stream = Stream(bits, 128, {e: format(e, "08b") for e in range(256)})
    assert np.array_equal(decode(build.build(only="dfloat11_decode"), stream, 2), bits)


def test_numbers_without_a_code() -> None:
    """Fewer codes than numbers: exponent 0, and nothing is left as the allocator gave it."""
    stream = stream_of(Case(5000))
    half = stream.codes.size // 2 // 512 * 512
    stream.codes = stream.codes[:half].copy()
    stream.positions = np.array([*stream.positions[: half // 512], 5000], np.uint32)
    found = decode(build.build(only="dfloat11_decode"), stream, 132)
    last = int(np.flatnonzero(found >> 7 & 255)[-1])
    assert 1000 < last < 4000 and np.array_equal(found[: last - 1], stream.bits[: last - 1])
    assert np.array_equal(found[last + 1 :], stream.bits[last + 1 :] & 0x807F)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", ["normal", "long"])
def test_encoder(kind: str, backend: str) -> None:
    """The other decoders read what the tests here encode: tables too whose free entries hold a code that is shorter."""
    for numel in (43, 148, 288, 358, 386, 2500):
        stream = stream_of(Case(numel, kind, 32))
        tensors = [
            torch.from_numpy(p.view(np.uint8).copy())
            for p in (stream.luts, stream.codes, stream.sign_mantissa, stream.positions, stream.gaps)
        ]
        with fastloss.use_backend(backend):
            found = torch.ops.fastloss.dfloat11_decode(tensors[0].reshape(-1, 256), *tensors[1:], numel, 8, 32)
        assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16), stream.bits), numel


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races, of right and of hostile streams."""
    library = build.build(variant, only="dfloat11_decode")
    code, output = build.run_sanitized(variant, library, module="dfloat11_decode")
    assert code == 0, output


class Device:
    """What the glue calls of `_C`, on the host."""

    @staticmethod
    def dfloat11_decode_cuda(*, device: Any, stream: int, **fields: int) -> None:
        library = build.load(build.build(only="dfloat11_decode"))
        error = library.c_dfloat11(ctypes.byref(CDfloat11(**fields)), 132)
        assert error is None, error


def test_glue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors off their alignment too; they are left alone."""
    monkeypatch.setattr(cuda_dfloat11, "_C", Device)
    monkeypatch.setattr(backend_cuda, "_missing", lambda x: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    stream = stream_of(Case(3001, "long"))
    parts = [stream.luts, stream.codes, stream.sign_mantissa, stream.positions, stream.gaps]
    tensors = [torch.from_numpy(p.view(np.uint8).copy()) for p in parts]
    tensors[0] = tensors[0].reshape(-1, 256)
    moved = [torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].reshape(t.shape) for t in tensors]
    for arguments in (tensors, moved):
        before = [t.clone() for t in arguments]
        assert cuda_dfloat11._why_not(*arguments, 3001, 8, 64) is None
        found = cuda_dfloat11.dfloat11_decode(*arguments, 3001, 8, 64)
        assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16), stream.bits)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert "8 bytes a thread" in (cuda_dfloat11._why_not(*tensors, 3001, 4, 64) or "")
    assert "multiple of 32" in (cuda_dfloat11._why_not(*tensors, 3001, 8, 65) or "")
