"""The bit ops in the self-test of `fastloss info`: torch's cross entropy, off by how far an op is from its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import registry
from .contract import Activation, Grad, Pack, Save, Surrogate, row_bytes


def arguments(op: str, x: Any, w: Any) -> tuple[Any, ...]:
    """Arguments of a bit op, made of the numbers of x [M, K] and w [N, K]."""
    m, columns = x.shape
    n = w.shape[0]

    def of_groups(count: int) -> Any:
        return torch.linspace(0.3, 0.7, count, device=x.device)

    def bits(rows: int, planes: int) -> tuple[Any, Any]:  # some pattern, no padding: 512 columns
        made = torch.arange(planes * rows * row_bytes(512), device=x.device) * 37 % 251
        made = made.to(torch.uint8).reshape(planes, rows, row_bytes(512))
        counts = (made[..., None] >> torch.arange(8, device=x.device, dtype=torch.uint8) & 1).sum(
            (2, 3), dtype=torch.int32
        )
        return made, counts

    def hashed() -> tuple[Any, ...]:  # codes of 20 bits, and w as values
        codes = torch.arange(2 * n * 20, device=x.device) * 37 % 11 % 2 * 2 - 1
        return (*codes.to(w.dtype).reshape(2, 1, n, 20), w[None])

    product = (*bits(m, 1), *bits(n, 2), 512, [2], -1, [-1, 2], 0)
    epilogue = (of_groups(m), of_groups(n), of_groups(n) - 0.5, int(Activation.RELU))
    surrogate = (m, columns, int(Surrogate.RESTE), 3.0, 1.5)
    levels = (of_groups(m), None, None, m, columns, -4.0, 3.0, 1.0, 0.0, False)
    codes = torch.arange(4 * 256, device=x.device).to(torch.uint8).reshape(4, 256)
    made: dict[str, Callable[[], tuple[Any, ...]]] = {
        "pack_bits": lambda: (x, int(Pack.CODES), None, of_groups(m)[:, None], 0, -4, 3),
        "unpack_bits": lambda: (bits(n, 2)[0], 500, [-1, 2], 0, of_groups(n)[:, None], 0, x.dtype),
        "bgemm": lambda: (*product, *epilogue, x.dtype),
        "bgemm_signs": lambda: (*product, *epilogue),
        "hamming_topk": lambda: (*product, None, 5),
        "lowbit_matmul": lambda: (
            x, bits(n, 2)[0][..., : row_bytes(columns)], columns, [-1, 2], 0, of_groups(n)[:, None], 0, False, None, None, x.dtype
        ),
        "nearest_key": lambda: (x, w),
        "binarize": lambda: (x, of_groups(m), None, *surrogate, int(Save.DENSE | Save.SIGNS | Save.MASK | Save.CODES)),
        "binarize_backward": lambda: (
            x * 0.7, x, None, None, None, of_groups(m), of_groups(m), *surrogate, int(Grad.X | Grad.SCALE | Grad.SHIFT)
        ),
        "fake_quant": lambda: (x, *levels),
        "fake_quant_backward": lambda: (x * 0.7, x, *levels, int(Grad.X | Grad.SCALE | Grad.SHIFT)),
        "hash_attention": lambda: (*hashed(), False, True),
        "hash_attention_backward": lambda: (w[None] * 0.7, *hashed(), w[None] * 0.1, of_groups(n)[None] + n, False, True, 7),
        "quantize_groups": lambda: (x.flatten(), 256, 8, None, None, torch.ones(1, dtype=torch.int64, device=x.device)),
        "dequantize_groups": lambda: (codes, of_groups(4), of_groups(4), 1000, 256, 8, x.dtype),
    }  # fmt: skip
    return made[op]()


def _apart(got: Any, wanted: Any) -> Any:
    """The largest difference of two results, relative to the largest number of each."""
    pairs = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, wanted)), strict=True)
    apart = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs if b.numel()
    ]
    return torch.stack(apart).amax()


def by_op(op: str) -> Callable[..., Any]:
    """The loss, off by how far `op` of the backend in use is from its reference."""

    def loss(q: Any, k: Any, target: Any) -> Any:
        value = F.cross_entropy(q.float() @ k.float().T, target, reduction="sum")
        with torch.no_grad():
            given = arguments(op, q, k)
            got = registry.run(op, *given)
            with registry.use_backend("reference"):
                off = value * _apart(got, registry.run(op, *given))
        return value + off.to(value.device)

    return loss


OPS = (
    "pack_bits", "unpack_bits", "bgemm", "bgemm_signs", "hamming_topk", "nearest_key", "lowbit_matmul",
    "binarize", "binarize_backward", "fake_quant", "fake_quant_backward", "quantize_groups", "dequantize_groups",
    "hash_attention", "hash_attention_backward",
)  # fmt: skip


def cases() -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
    """Name -> (the ops it runs through, the loss of q, k and the class of each row)."""
    return {op: ((op,), by_op(op)) for op in OPS}
