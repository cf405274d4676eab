"""Every kernel by itself at the shapes of docs/device.md: one JSON line a case, a short table at the end.

`python bench/device_kernels.py --out FILE [--start K] [--deadline UNIX_TIME] [--tiny]`; bench/device_check.py calls it.
All implementations of a case take turns. Inputs rotate over copies that together exceed the L2 cache. Results of ours at
full size are compared with the reference on a sample of rows, since the tests run on smaller shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastloss
from common import CUDA, Group, head, logits
from device_lossless import lossless_case, lossless_cases
from device_pairs import pair_case, pair_cases
from device_quant import quant_case, quant_cases
from device_timing import DEVICE, Case, copies, in_turn, kernels, on, peak, relative, rotating, sample
from implementations import backend, build

ops = torch.ops.fastloss


def cases(tiny: bool) -> list[Case]:
    """What matters most comes first: the run may be cut."""
    main, small = ((24, 96), (16, 64)) if tiny else ((8192, 128256), (4096, 32000))
    head_main, head_small = ((24, 16, 96), (16, 16, 64)) if tiny else ((8192, 4096, 128256), (4096, 2048, 32000))
    modes = ("both", "stats", "gradient")
    return [
        *(Case("rows", mode, "bfloat16", main) for mode in modes),
        *(Case("linear", mode, "bfloat16", head_main) for mode in ("C", "R")),
        *pair_cases(tiny),
        *quant_cases(tiny),
        *lossless_cases(tiny),
        *(Case("linear", mode, "bfloat16", head_small) for mode in ("C", "R")),
        *(Case("rows", mode, "float32", main) for mode in modes),
        *(Case("rows", mode, "float16", main) for mode in modes),
        *(Case("rows", mode, "bfloat16", small) for mode in modes),
        Case("linear", "C", "float32", head_small),
    ]


# ---------------------------------------------------------------------------------------------------------- the cases


def copy_bandwidth() -> float:
    """GB/s of a large device copy, bytes read and bytes written: the ceiling of everything in `rows`."""
    source = torch.randn((1 << 30 if CUDA else 1 << 20) // 4, device=DEVICE)
    target = torch.empty_like(source)
    times, _ = in_turn({"copy": lambda: target.copy_(source)})
    return 2 * source.nbytes / times["copy"]["median"] / 1e6


def rows_case(case: Case) -> dict[str, Any]:
    n = case.shape[0]
    group = Group("cross_entropy", "forward+backward", case.dtype, case.shape, "peaked", DEVICE)
    z, y = logits(group)
    sets = copies((z, y))
    with backend("reference"):
        at = sample(n)
        few_z, few_y = z[at], y[at]
        few_stats, few_argmax = ops.row_stats(few_z, few_y)
    coef = torch.stack([torch.full((n,), c, device=DEVICE) for c in (-1 / n, 1 / n, 0, 0, 0, 0, 0)])
    epilogue = torch.stack([torch.full((n,), e, device=DEVICE) for e in (1 / n, 0, 0, 0)])
    first = next(kernels())
    with backend(first):
        stats, argmax = ops.row_stats(z, y)

    def call(z: Tensor, y: Tensor) -> Any:
        if case.mode == "stats":
            return ops.row_stats(z, y)[0]
        if case.mode == "gradient":
            return ops.row_stats_backward(coef, stats, argmax, z, y)
        return ops.cross_entropy(z, y, None, None, epilogue)[2]

    with backend("reference"):
        if case.mode == "stats":
            truth = few_stats[:3]
        elif case.mode == "gradient":
            truth = ops.row_stats_backward(coef[:, at], few_stats, few_argmax, few_z, few_y)
        else:
            truth = ops.cross_entropy(few_z, few_y, None, None, epilogue[:, at])[2]
    errors, calls = {}, {}
    for name in kernels():
        with backend(name):
            out = call(z, y)
            errors[f"fastloss-{name}"] = relative(out[:3, at] if case.mode == "stats" else out[at], truth)
        del out
        step = rotating(call, sets)
        calls[f"fastloss-{name}"] = on(name, step)
    buffer = torch.empty_like(z)
    if case.mode == "stats":
        calls["torch logsumexp"] = rotating(lambda z, y: torch.logsumexp(z, 1), sets)
    else:
        calls["copy"] = rotating(lambda z, y: buffer.copy_(z), sets)
    if case.mode == "both":
        peers = build(group).calls
        calls.update({k: c for k, c in peers.items() if not k.startswith("fastloss") and k != "torch_compile"})
    times, failed = in_turn(calls)
    nbytes = z.nbytes * (1 if case.mode == "stats" else 2)
    return {"ms": times, "failed": failed, "errors": errors, "nbytes": nbytes}


def linear_case(case: Case) -> dict[str, Any]:
    """C: linear_cross_entropy, gradients in the forward. R: linear_row_stats and its backward."""
    n, d, v = case.shape
    group = Group("linear_cross_entropy", "forward+backward", case.dtype, case.shape, "peaked", DEVICE)
    x, w, y = head(group)
    epilogue = torch.stack([torch.full((n,), e, device=DEVICE) for e in (1 / n, 0, 0, 0)])

    def mode_c(x: Tensor, y: Tensor, epilogue: Tensor, needs: int = 3) -> Tensor:
        return ops.linear_cross_entropy(x, w, None, y, None, None, epilogue, needs=needs)[2]

    def mode_r() -> Tensor:
        stats, argmax = ops.linear_row_stats(x, w, None, y)
        d = (stats[2] - stats[0]) - stats[1]
        coef = torch.zeros(7, n, device=DEVICE)
        coef[1] = torch.sigmoid(-d) / n
        coef[0] = -coef[1]
        return ops.linear_row_stats_backward(coef, stats, argmax, x, w, None, y, needs=3)[0]

    at = sample(n)
    with backend("reference"):
        truth = mode_c(x[at], y[at], epilogue[:, at], 1)
    errors, calls, extra = {}, {}, {}
    for name in kernels():
        ours = on(name, (lambda: mode_c(x, y, epilogue)) if case.mode == "C" else mode_r)
        try:
            errors[f"fastloss-{name}"] = relative(ours()[at], truth)  # type: ignore[index]
        except fastloss.BackendError:
            continue  # this backend has no kernel for it; linear_cross_entropy of triton, for one
        extra[f"fastloss-{name}"] = peak(ours) - x.nbytes - w.nbytes
        calls[f"fastloss-{name}"] = ours
    peers = build(group).calls
    calls.update({k: c for k, c in peers.items() if not k.startswith("fastloss") and k != "torch_compile"})
    times, failed = in_turn(calls)
    flops = (6 if case.mode == "C" else 8) * n * d * v
    return {"ms": times, "failed": failed, "errors": errors, "flops": flops, "extra_bytes": extra,
            "logits_bytes": n * v * x.element_size()}  # fmt: skip


RUN = {"rows": rows_case, "linear": linear_case, "pairs": pair_case, "quant": quant_case,
       "lossless": lossless_case}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0, help="go on with this case")
    parser.add_argument("--deadline", type=float, default=math.inf, help="start no case after this time")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    def write(**fields: Any) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    if options.start == 0:
        write(copy_gb_s=copy_bandwidth())
    for number, case in enumerate(cases(options.tiny)):
        if number < options.start:
            continue
        if time.time() > options.deadline:
            break
        write(started=number, **case.__dict__)
        try:
            write(finished=number, **case.__dict__, **RUN[case.family](case))
        except Exception as error:
            write(finished=number, **case.__dict__, error=f"{type(error).__name__}: {error}"[:1000])
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
