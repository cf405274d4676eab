"""`hash_attention` of the `cpp` backend (csrc/cpu/hash_attention.cpp): the forward and each gradient is one sum over pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import HashGrad


def why_not_operands(q: Tensor, k: Tensor, v: Tensor, own: bool, causal: bool) -> str | None:
    """Why a kernel cannot take these operands, whatever the backend, or None."""
    if v.dtype not in DTYPES or q.dtype != v.dtype or k.dtype != v.dtype:
        return f"takes float32, float16 or bfloat16, the same for codes and v; got {q.dtype}, {k.dtype} and {v.dtype}"
    given = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 3 and q.shape[0] == k.shape[0] == v.shape[0]
    if not fits or q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1] or not q.shape[2] or not k.shape[1]:
        return f"takes [G, N, bits], [G, M, bits] and [G, M, E] with a bit and a key, got {given}"
    if (own or causal) and q.shape[1] != k.shape[1]:
        return f"takes as many queries as keys where causal or with the token's own v, got {given}"
    return None


def why_not_saved(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d: Tensor, own: bool, causal: bool, needs: int
) -> str | None:
    """And those of the backward."""
    if reason := why_not_operands(q, k, v, own, causal):
        return reason
    if {grad.dtype, out.dtype} != {v.dtype} or d.dtype != torch.float32:
        return f"takes grad and out in {v.dtype} and d in float32, got {grad.dtype}, {out.dtype} and {d.dtype}"
    wanted = (*q.shape[:2], v.shape[2])
    if grad.shape != wanted or out.shape != wanted or d.shape != q.shape[:2]:
        return f"takes grad and out {list(wanted)}, got {list(grad.shape)}, {list(out.shape)} and d {list(d.shape)}"
    return None


def _sums(
    x: Tensor, w: Tensor, z: Tensor, direction: int, *, constant: float = 0.0, own: float = 0.0,
    alpha: Tensor | None = None, beta: Tensor | None = None, d: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:  # fmt: skip
    """y_i = sum over j of (<x_i, w_j> + alpha_i beta_j) z_j + own z_i, the rows of x, w and z times `scales`."""
    y = kept_memory.empty((*x.shape[:2], z.shape[2]), z.dtype)
    rows = [(pointer(t), pointer(s), t.shape[2]) for t, s in zip((x, w, z), scales, strict=True)]
    _C.hash_attention_cpu(  # type: ignore[union-attr]
        x=rows[0], w=rows[1], z=rows[2], alpha=pointer(alpha), beta=pointer(beta), alpha_constant=constant, own=own,
        d=pointer(d), bias=x.shape[2] + 1, y=pointer(y), groups=x.shape[0], queries=x.shape[1], keys=w.shape[1],
        direction=direction, dtype=DTYPES[z.dtype], isa=backend_cpp.ISA,
    )  # fmt: skip
    return y


@kernel("hash_attention", "cpp", lambda q, *args: backend_cpp._missing(q) or why_not_operands(q, *args))
def hash_attention(q: Tensor, k: Tensor, v: Tensor, own: bool, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    b = float(q.shape[2] + 1)
    d = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return _sums(q, k, v, int(causal), constant=0.0 if own else b, own=b if own else 0.0, d=d), d


@kernel("hash_attention_backward", "cpp", lambda g, *args: backend_cpp._missing(g) or why_not_saved(g, *args))
def hash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d: Tensor, own: bool, causal: bool, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out, d = (t.contiguous() for t in (grad, q, k, v, out, d))
    inverse, slope, b, order = torch.empty_like(d), torch.empty_like(d), float(q.shape[2] + 1), int(causal)
    _C.hash_slopes_cpu(  # type: ignore[union-attr]
        grad=pointer(grad), out=pointer(out), d=pointer(d), inverse=pointer(inverse), slope=pointer(slope),
        tokens=d.numel(), width=v.shape[2], dtype=DTYPES[v.dtype], isa=backend_cpp.ISA,
    )  # fmt: skip
    dq = dk = dv = v.new_empty(0)
    if needs & HashGrad.Q:
        dq = _sums(grad, v, k, order, alpha=slope, scales=(inverse, None, None))
    if needs & HashGrad.K:
        dk = _sums(v, grad, q, -order, constant=1.0, beta=slope, scales=(None, inverse, None))
    if needs & HashGrad.V:
        form = {"own" if own else "constant": b}
        dv = _sums(k, q, grad, -order, scales=(None, None, inverse), **form)  # type: ignore[arg-type]
    return dq, dk, dv
