"""Nothing is read or written outside the tensors of a launch, whatever a blob holds: the interpreter's accesses are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import lossless_cases as cases
from fastloss import lossless
from fastloss.lossless.contract import SLACK, Codec, Layout, Section
from triton_lossless_blobs import P7, R8, packed, run, same

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Outside(Exception):
    """An access outside the tensors of a launch."""


def extent(t: Tensor) -> int:
    """The bytes from the first number of a tensor to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of every load and store lies in a tensor of the launch; loads may reach a blob's slack."""
    spans: list[tuple[int, int]] = []
    builder = interpreter.InterpreterBuilder
    arguments = interpreter.GridExecutor._init_args_hst

    def remember(self: Any, args: Any, kwargs: Any) -> Any:
        given, named = arguments(self, args, kwargs)
        tensors = [t for t in (*given, *named.values()) if isinstance(t, Tensor)]
        spans[:] = [(t.data_ptr(), t.data_ptr() + extent(t)) for t in tensors]
        return given, named

    def check(pointers: Any, mask: Any, slack: int) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data) != 0].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for begin, end in spans:
            inside |= (at >= begin) & (at + size <= end + slack)
        if not inside.all():
            raise Outside(f"{int((~inside).sum())} addresses, element of {size} bytes")

    def watched(name: str, mask_at: int, slack: int) -> None:
        plain = getattr(builder, name)

        def access(self: Any, *args: Any) -> Any:
            check(args[1 if name == "create_atomic_rmw" else 0], args[mask_at], slack)
            return plain(self, *args)

        monkeypatch.setattr(builder, name, access)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    watched("create_masked_load", 1, SLACK)
    watched("create_masked_store", 2, 0)
    watched("create_atomic_rmw", 3, 0)


def test_an_access_outside_is_seen(bounds: None) -> None:
    @triton.jit
    def beyond(x, y):
        tl.store(y + 1, tl.load(x + 64))

    x = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(Exception, match="Outside"):
        beyond[(1,)](x, x)


def hostile(c: lossless.CompressedTensor, seed: int, small: bool) -> Tensor:
    """The blob with random bytes in every section; `small`: offsets that lie near the list."""
    blob = c.blob.clone()
    generator = torch.Generator().manual_seed(seed)
    for kind, (offset, count, _) in c.header.sections.items():
        noise = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        if small and kind in (Section.ESCAPE_OFFSETS, *range(Section.FIELD_OFFSETS, Section.RAW, 3)):
            most = c.header.sections[kind + 1][1] if kind + 1 in c.header.sections else 1
            near = torch.randint(most // 2, most + 3, (count // 8,), generator=generator)
            near[0] = -(1 << 20)
            noise = near.view(torch.uint8)
        blob[offset : offset + count] = noise
    return blob


def embedded(blob: Tensor, fill: int, at: int) -> tuple[Tensor, Tensor]:
    """(a larger buffer, the blob within it)."""
    room = torch.full((at + blob.numel() + 256,), fill, dtype=torch.uint8)
    view = room[at : at + blob.numel()]
    view.copy_(blob)
    return room, view


def calls(c: lossless.CompressedTensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    rows, columns = c.header.matrix
    n = c.numel()
    yield "decode", lambda blob: run("lossless_decode", blob, c.plan, 0, n, c.dtype)
    if c.layout == Layout.ROWS:
        yield "range", lambda blob: run("lossless_decode", blob, c.plan, 5, n - 9, c.dtype)
        index = torch.tensor([0, rows - 1])
        yield "rows", lambda blob: run("lossless_rows", blob, c.plan, index, c.dtype)
    if c.codec == P7 and c.dtype != torch.float32:
        x = torch.ones(3, columns).to(c.dtype)
        if columns < 500:
            yield "linear", lambda blob: run("lossless_linear", x, blob, c.plan)
        yield "linear of a row", lambda blob: run("lossless_linear", x[:1], blob, c.plan)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    ("dtype", "codec", "shape", "layout"),
    [
        (torch.bfloat16, P7, (30, 560), 0), (torch.float16, P7, (5, 100), 0), (torch.float32, P7, (5, 101), 0),
        (torch.bfloat16, P7, (16, 128), 1), (torch.bfloat16, R8, (3, 30), 0), (torch.float32, R8, (2, 30), 0),
        (torch.float8_e4m3fn, R8, (3, 30), 0),
    ],
)  # fmt: skip
def test_hostile_content(
    bounds: None, dtype: torch.dtype, codec: Codec, shape: tuple[int, int], layout: int, small: bool
) -> None:
    """Valid plans of nonsense: the fixture sees every address, nothing around the blob changes a result or is changed."""
    c = packed(cases.mostly_normal(shape[0] * shape[1], dtype).reshape(shape), codec, Layout(layout))
    blob = hostile(c, 3, small)
    for name, call in calls(c):
        results = []
        for fill, at in ((0, 64), (255, 67)):
            room, view = embedded(blob, fill, at)
            before = room.clone()
            results.append(call(view))
            assert torch.equal(room, before), name
        assert all(same(results[0], r) for r in results[1:]), name
        if codec == R8 and name == "decode":
            assert same(results[0], run("lossless_decode", blob, c.plan, 0, c.numel(), dtype, backend="reference"))
