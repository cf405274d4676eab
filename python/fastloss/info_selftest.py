"""The self-test of `fastloss info`: every op's loss and gradients on every backend that takes them, against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastloss

from . import registry
from .contract import NUM_EPILOGUES
from .info import CLASSES, DTYPES, FEATURES, ROWS, devices, guarded
from .lossless import selftest as lossless_selftest
from .pairs import selftest as pairs_selftest
from .quant import selftest as quant_selftest
from .reference import epilogue_coefficients


def _cases() -> dict[str, tuple[tuple[str, ...], Callable[..., list[Any]]]]:
    """Name -> (the ops it runs through; what calls them as a user would, and returns the loss and every gradient).

    Every loss is the sum of torch's cross entropy over the rows.
    """

    def graded(loss: Callable[..., Any]) -> Callable[..., list[Any]]:
        def run(*operands: Any, target: Any) -> list[Any]:
            value = loss(*operands, target)
            return [value, *torch.autograd.grad(value, operands)]

        return run

    def into_a_buffer(x: Any, w: Any, target: Any) -> list[Any]:
        buffer = torch.zeros(w.shape, device=w.device)
        value = fastloss.linear_cross_entropy(x, w, target, reduction="sum", grad_weight=buffer)
        return [value, *torch.autograd.grad(value, (x,)), buffer]

    def made_again(z: Any, target: Any) -> list[Any]:
        loss = fastloss.cross_entropy(z, target, reduction="sum")
        with torch.no_grad():  # the gradient of twice the loss, then halved
            epilogue = torch.zeros(NUM_EPILOGUES, len(z), device=z.device)
            epilogue[0] = 2
            stats, argmax = registry.run("row_stats", z, target)
            coef, gradient, two = epilogue_coefficients(stats, epilogue, False), torch.zeros_like(z), epilogue[0, 0]
            registry.run("row_stats_backward_unless_one_", gradient, two, coef, stats, argmax, z, target)
            registry.run("scale_unless_one_", gradient, two / 4)
        return [loss, gradient]

    def divergence(z: Any, target: Any) -> list[Any]:
        """Of the distribution that is one class, the divergence is the cross entropy; its gradient made in both ways."""
        x, q = z.float().log_softmax(1), F.one_hot(target, z.shape[1]).float()
        loss = fastloss.functional.kl_div(x, q, reduction="sum")
        with torch.no_grad():
            up, again = torch.full((), 2.0, device=z.device), torch.zeros_like(q)
            registry.run("pointwise_loss_backward_unless_one_", again, up, x, q, None, None, 1, 0.25)
            again += registry.run("pointwise_loss_backward", up, x, q, None, None, 1, 0.25)
        return [loss, *torch.autograd.grad(x, z, again)]

    def drawn(z: Any, target: Any) -> Any:  # log p of what was drawn, against the loss of the same column
        with torch.no_grad():
            index, logp = registry.run("row_sample", z, torch.tensor(1).to(z.device), torch.arange(len(z)).to(z.device))
            off = (logp + fastloss.cross_entropy(z, index, reduction="none")).abs().sum()
        return fastloss.cross_entropy(z, target, reduction="sum") + off

    def as_region(z: Any, target: Any) -> Any:  # -log p = softplus(-d): binary cross entropy of the margin with label 1
        own = F.one_hot(target, z.shape[1]).bool()
        z = z.float()
        margin = z[own] - z.masked_fill(own, -torch.inf).logsumexp(1)
        return fastloss.region_stats(margin[None], torch.ones_like(margin)[None], stats="bce").bce.sum()

    def by_terms(z: Any, target: Any) -> Any:  # the same loss by the op that also takes teachers and lists
        return -fastloss.row_stats(z, target, listed=target[:, None]).logp.sum()

    def head_by_terms(x: Any, w: Any, target: Any) -> Any:
        return -fastloss.linear_row_stats(x, w, target, listed=target[:, None]).logp.sum()

    head = fastloss.linear_cross_entropy
    backward = "linear_row_stats_backward"
    return {
        "rows and their backward": (
            ("row_stats", "row_stats_backward"), graded(lambda z, t: -fastloss.row_stats(z, t).logp.sum())
        ),
        "cross_entropy": (("cross_entropy",), graded(lambda z, t: fastloss.cross_entropy(z, t, reduction="sum"))),
        "gradient made again, scaled": (
            ("cross_entropy", "row_stats", "row_stats_backward_unless_one_", "scale_unless_one_"), made_again
        ),
        "pointwise losses": (
            ("pointwise_loss", "pointwise_loss_backward", "pointwise_loss_backward_unless_one_"), divergence
        ),
        "region_stats": (("region_stats", "region_stats_backward"), graded(as_region)),
        "row_terms": (("row_terms", "row_terms_backward"), graded(by_terms)),
        "linear row_terms": (
            ("linear_row_terms", "linear_row_terms_backward", "row_terms", "row_terms_backward"), graded(head_by_terms)
        ),
        "row_sample": (("row_sample", "row_stats", "cross_entropy"), graded(drawn)),
        "linear rows and their backward": (
            ("linear_row_stats", backward), graded(lambda x, w, t: head(x, w, t, reduction="none").sum())
        ),
        "linear rows, dW into a buffer": (("linear_row_stats", backward + "_into"), into_a_buffer),
        "linear_cross_entropy": (
            ("linear_cross_entropy",), graded(lambda x, w, t: head(x, w, t, reduction="sum"))
        ),
        **{
            name: (ops, graded(loss))
            for selftest in (pairs_selftest, quant_selftest, lossless_selftest)
            for name, (ops, loss) in selftest.cases().items()
        },
    }  # fmt: skip


#: The first op of a case says what it takes: of these x [N, D] and w [V, D], of the others the logits.
TWO_OPERANDS = ("linear", "pair_", "row_topk", "edge_", *quant_selftest.OPS, *lossless_selftest.OPS)


def _worst(run: Callable[..., list[Any]], operands: Iterable[Any], target: Any) -> float:
    """The largest error of the loss and of every gradient against fp64, each relative to its largest value."""
    got = run(*(t.clone().requires_grad_() for t in operands), target=target)
    wide = [t.double().cpu().requires_grad_() for t in operands]
    loss = F.cross_entropy(wide[0] if len(wide) == 1 else F.linear(*wide), target.cpu(), reduction="sum")
    expected = [loss, *torch.autograd.grad(loss, wide)]
    pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(got, expected, strict=True)]
    errors = [(a - b).abs().max() / b.abs().max() for a, b in pairs]
    return max(float(torch.nan_to_num(e, nan=float("inf"))) for e in errors)


def self_test(table: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A forward and backward of every case on every device, dtype and backend whose kernels say ok."""
    says = {(r["op"], r["device"], r["dtype"], r["backend"]): r["says"] for r in table}
    results = []
    for device, dtype, backend in itertools.product(devices(), DTYPES, registry.BACKENDS):
        kind = getattr(torch, dtype)
        g = torch.Generator().manual_seed(0)
        x, w = (torch.randn(n, FEATURES, generator=g).to(device, kind) for n in (ROWS, CLASSES))
        w = w / 4  # logits of a few units, as a head has them
        target = torch.randint(CLASSES, (ROWS,), generator=g).to(device)
        # 16-bit logits are rounded once, by |z| eps / 2; float32 sums of 203 terms several times
        allowed = (16 if dtype == "float32" else 2) * torch.finfo(kind).eps
        for name, (ops, run) in _cases().items():
            if any(says.get((op, device, dtype, backend)) != "ok" for op in ops):
                continue
            operands = (x, w) if ops[0].startswith(TWO_OPERANDS) else (x @ w.T,)
            with registry.use_backend(backend):
                error = guarded(partial(_worst, run, operands, target))
            broke = isinstance(error, dict)
            results.append({
                "case": name, "ops": list(ops), "device": device, "dtype": dtype, "backend": backend,
                "error": error["error"] if broke else error, "allowed": allowed,
                "passed": not broke and error <= allowed,
            })  # fmt: skip
    return results
