"""Every operation that is measured, and everyone who implements it: ours, torch's, and peers where they are installed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import common
import fastloss
from common import TINY, Group

Call = Callable[[], object]
Loss = Callable[..., Tensor]


@dataclass
class Case:
    """The implementations of one group as calls without arguments, over operands they share."""

    calls: dict[str, Call]
    operands: tuple[Tensor, ...]
    nbytes: int  # the fewest bytes of large matrices that must move
    flops: int
    gradient_bytes: int = 0  # what stays after the call
    accumulator_bytes: int = 0  # a float32 dW, beside the gradient itself
    logits_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        """The implementation whose ratios are kept: our preferred backend."""
        return next(name for name in self.calls if name.startswith("fastloss"))


#: Holds for the whole process: the backward of CUDA tensors runs on autograd's own threads.
backend = fastloss.use_backend


def on_backend(name: str, call: Call) -> Call:
    def run() -> object:
        with backend(name):
            return call()

    return run


def ours(device: str, call: Call) -> dict[str, Call]:
    """`call` on each of our backends that has a kernel for it here; on the reference where none has."""
    found = {}
    for name in fastloss.registry.ORDER[device]:
        if name == "reference" and found:
            break
        run = on_backend(name, call)
        try:
            run()
        except fastloss.BackendError:
            continue
        found[f"fastloss-{name}"] = run
    return found


def peer(device: str, module: str, attribute: str) -> Any:
    """module.attribute where it can be imported and has a GPU to run on, else None."""
    if device != "cuda":
        return None
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, RuntimeError):
        return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend="eager" if TINY else "inductor")


def training_step(loss: Loss, *leaves: Tensor) -> Call:
    """Forward and backward into fresh gradients."""

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value

    return call


def cross_entropy(group: Group) -> Case:
    """Loss of logits that exist; one read and one write."""
    z, y = common.logits(group)
    z.requires_grad_()
    fast = compiled(F.cross_entropy)
    calls = {
        "torch": training_step(lambda: F.cross_entropy(z, y), z),
        "torch_compile": training_step(lambda: fast(z, y), z),
        **ours(group.device, training_step(lambda: fastloss.cross_entropy(z, y), z)),
    }
    if liger := peer(group.device, "liger_kernel.transformers.functional", "liger_cross_entropy"):
        copy = torch.empty_like(z)  # it writes the gradient over its input, which the others still need

        def liger_step() -> Tensor:
            leaf = copy.copy_(z.detach()).detach().requires_grad_()
            value = liger(leaf, y)
            value.backward()
            return value

        calls["liger"] = liger_step
    if quack := peer(group.device, "quack.cross_entropy", "cross_entropy"):
        calls["quack"] = training_step(lambda: quack(z, y, reduction="mean"), z)
    size = z.nbytes
    return Case(calls, (z, y), 2 * size, 0, gradient_bytes=size, logits_bytes=size)


def linear_cross_entropy(group: Group) -> Case:
    """Loss of a linear head; three GEMMs. "gemms" is these three alone, into outputs that exist."""
    n, d, v = group.shape
    x, w, y = common.head(group)
    x.requires_grad_()
    w.requires_grad_()

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    fast = compiled(lambda x, w, y: F.cross_entropy(F.linear(x, w), y))
    calls: dict[str, Call] = {
        "gemms": gemms(x.detach(), w.detach()),
        "torch": training_step(eager, x, w),
        "torch_compile": training_step(lambda: fast(x, w, y), x, w),
        **ours(group.device, training_step(lambda: fastloss.linear_cross_entropy(x, w, y), x, w)),
    }
    if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):
        chunked = options(acc_policy="accurate")
        calls["torch_chunked"] = training_step(lambda: F.linear_cross_entropy(x, w, y, options=chunked), x, w)
    if liger := peer(
        group.device, "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    ):

        def liger_loss() -> Tensor:
            out = liger.apply(x, w, y)
            return out[0] if isinstance(out, tuple) else out

        calls["liger"] = training_step(liger_loss, x, w)
    if cce := peer(group.device, "cut_cross_entropy", "linear_cross_entropy"):
        calls["cce"] = training_step(lambda: cce(x, w, y), x, w)
    if quack := peer(group.device, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"):
        calls["quack"] = training_step(lambda: quack(x, w, y), x, w)
    size = x.element_size()
    return Case(
        calls, (x, w, y), 2 * (x.nbytes + w.nbytes), 6 * n * d * v, gradient_bytes=x.nbytes + w.nbytes,
        accumulator_bytes=4 * v * d, logits_bytes=n * v * size,
    )  # fmt: skip


def gemms(x: Tensor, w: Tensor) -> Call:
    """The arithmetic of a training step alone: logits, dX and dW by the library's GEMM into memory that is there."""
    buffers: list[Tensor] = []

    def call() -> None:
        if not buffers:  # allocated when first called: a memory probe of someone else must not see them
            buffers.extend((x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)))
        z, dx, dw = buffers
        torch.mm(x, w.T, out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.T, x, out=dw)

    return call


def distillation(group: Group) -> Case:
    """A linear head learns from another one; four GEMMs. group.mode is the loss."""
    n, d, v = group.shape
    x, w, y = common.head(group)
    on: dict[str, Any] = {"device": group.device, "dtype": group.torch_dtype}
    teacher = fastloss.TeacherHead(  # of the same classes, and not the student
        x + torch.randn(n, d, **on), w + torch.randn(v, d, **on) / d**0.5
    )
    x.requires_grad_()
    w.requires_grad_()
    loss = getattr(fastloss.losses, group.mode)

    def eager(x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
        with torch.no_grad():
            q = F.linear(teacher_x, teacher_w).float().log_softmax(-1)
        p = F.linear(x, w).float().log_softmax(-1)
        if group.mode == "forward_kl":
            return F.kl_div(p, q, reduction="batchmean", log_target=True)
        m = torch.logaddexp(p, q) - math.log(2.0)
        return sum(F.kl_div(m, r, reduction="batchmean", log_target=True) for r in (p, q)) / 2  # type: ignore[return-value]

    fast, given = compiled(eager), (teacher.input, teacher.weight)
    target, buffers = torch.empty(0), gemms(x.detach(), w.detach())

    def four_gemms() -> None:
        nonlocal target
        if not len(target):
            target = teacher.input.new_empty(n, v)
        torch.mm(teacher.input, teacher.weight.T, out=target)
        buffers()

    calls: dict[str, Call] = {
        "gemms": four_gemms,
        "torch": training_step(lambda: eager(x, w, *given), x, w),
        "torch_compile": training_step(lambda: fast(x, w, *given), x, w),
        **ours(
            group.device,
            training_step(lambda: fastloss.linear_row_loss(x, w, None, loss, teacher=teacher), x, w),
        ),
    }
    return Case(
        calls, (x, w, y, *given), 3 * (x.nbytes + w.nbytes), 8 * n * d * v, gradient_bytes=x.nbytes + w.nbytes,
        accumulator_bytes=4 * v * d, logits_bytes=2 * n * v * x.element_size(),
    )  # fmt: skip


def row_stats(group: Group) -> Case:
    """The row kernel by its ops, without autograd. "copy" moves the same bytes; "torch" computes as much by one call."""
    n = group.shape[0]
    z, y = common.logits(group)
    ops = torch.ops.fastloss
    none = (None,) * 3
    stats, argmax = ops.row_stats(z, y)
    coef = torch.zeros(7, n, dtype=stats.dtype, device=z.device)
    coef[0], coef[1] = -1.0 / n, 1.0 / n
    epilogue = torch.zeros(4, n, dtype=stats.dtype, device=z.device)
    epilogue[0] = 1.0 / n
    mine: dict[str, Call] = {
        "stats": lambda: ops.row_stats(z, y),
        "gradient": lambda: ops.row_stats_backward(coef, stats, argmax, z, y),
        "both": lambda: ops.cross_entropy(z, y, None, None, epilogue),
        "entropy": lambda: ops.row_stats(z, y, *none, want=1),
    }
    theirs: dict[str, Call] = {
        "stats": lambda: torch.logsumexp(z, 1),
        "gradient": lambda: torch.softmax(z, 1),
        "both": lambda: torch.log_softmax(z, 1),
        "entropy": lambda: torch.special.entr(torch.softmax(z, 1)).sum(1),
    }
    target = torch.empty_like(z)
    calls: dict[str, Call] = {"torch": theirs[group.mode], **ours(group.device, mine[group.mode])}
    reads_only = group.mode in ("stats", "entropy")
    if not reads_only:
        calls["copy"] = lambda: target.copy_(z)
    size = z.nbytes
    return Case(calls, (z, y), size if reads_only else 2 * size, 0, 0 if reads_only else size, 0, size)


def focal(group: Group) -> Case:
    """A loss of the user's own over row_stats, forward and backward (mode L, kStats then kGradient)."""
    z, y = common.logits(group)
    z.requires_grad_()

    def rows(s: fastloss.RowStats) -> Tensor:
        return s.log1mp.exp().square() * s.nll

    def eager(z: Tensor, y: Tensor) -> Tensor:
        nll = F.cross_entropy(z.float(), y, reduction="none")
        return ((1 - torch.exp(-nll)).square() * nll).mean()

    fast = compiled(eager)
    calls = {
        "torch": training_step(lambda: eager(z, y), z),
        "torch_compile": training_step(lambda: fast(z, y), z),
        **ours(group.device, training_step(lambda: fastloss.row_loss(z, y, rows), z)),
    }
    size = z.nbytes
    return Case(calls, (z, y), 3 * size, 0, gradient_bytes=size, logits_bytes=size)


MARGIN_LOSSES = (
    "focal", "generalized_cross_entropy", "ldr_kl", "pass_at_n", "mean_absolute_error", "unlikelihood",
    "symmetric_cross_entropy", "asymmetric_unhinged",
)  # fmt: skip


def margin(group: Group) -> Case:
    """Losses of the margin against our own cross entropy, on logits [N, V] or on a head [N, D, V]; one row a loss."""
    loss = getattr(fastloss.losses, group.mode)
    if len(group.shape) == 2:
        z, y = common.logits(group)
        z.requires_grad_()
        calls = {
            "cross_entropy": training_step(lambda: fastloss.cross_entropy(z, y), z),
            **ours(group.device, training_step(lambda: fastloss.row_loss(z, y, loss), z)),
        }
        return Case(calls, (z, y), 2 * z.nbytes, 0, gradient_bytes=z.nbytes, logits_bytes=z.nbytes)
    n, d, v = group.shape
    x, w, y = common.head(group)
    x.requires_grad_()
    w.requires_grad_()
    calls = {
        "cross_entropy": training_step(lambda: fastloss.linear_cross_entropy(x, w, y), x, w),
        **ours(group.device, training_step(lambda: fastloss.linear_row_loss(x, w, y, loss), x, w)),
    }
    gradients = x.nbytes + w.nbytes
    return Case(
        calls, (x, w, y), 2 * gradients, 6 * n * d * v, gradient_bytes=gradients, logits_bytes=n * v * x.element_size()
    )


def region(group: Group) -> Case:
    """Dice of every sample and class, alone or with the binary cross entropy of the same pixels ("combo")."""
    torch.manual_seed(0)
    x = (torch.randn(group.shape, device=group.device) * 3).to(group.torch_dtype).requires_grad_()
    t = torch.rand(group.shape, device=group.device) < 0.3
    combo = group.mode == "combo"

    def eager(x: Tensor, t: Tensor) -> Tensor:
        p, t = x.float().sigmoid(), t.float()
        both, sums = (p * t).sum((2, 3)), p.sum((2, 3)) + t.sum((2, 3))
        loss = (1 - (2 * both + 1) / (sums + 1)).mean()
        return loss + F.binary_cross_entropy_with_logits(x.float(), t) if combo else loss

    def mine() -> Tensor:
        stats = fastloss.region_stats(x, t, per="sample_class", stats="bce" if combo else ())
        loss = fastloss.losses.dice(stats).mean()
        return loss + fastloss.losses.region_bce(stats).mean() if combo else loss

    fast = compiled(eager)
    calls = {
        "torch": training_step(lambda: eager(x, t), x),
        "torch_compile": training_step(lambda: fast(x, t), x),
        **ours(group.device, training_step(mine, x)),
    }
    return Case(calls, (x, t), 3 * x.nbytes + 2 * t.nbytes, 0, gradient_bytes=x.nbytes, logits_bytes=x.nbytes)


def sample(group: Group) -> Case:
    """A token of each row and its log-probability, one read; by torch's sampler, and by Gumbel noise of the same size."""
    z, _ = common.logits(group)

    def multinomial() -> Tensor:
        p = torch.softmax(z.float(), 1)
        index = torch.multinomial(p, 1)
        return p.gather(1, index).log()

    def gumbel() -> Tensor:
        noisy = z.float() - torch.empty_like(z, dtype=torch.float32).exponential_().log_()
        index = noisy.argmax(1, keepdim=True)
        return z.gather(1, index)[:, 0] - z.float().logsumexp(1)

    calls: dict[str, Call] = {
        "torch": multinomial,
        "torch_gumbel": gumbel,
        **ours(group.device, lambda: fastloss.row_sample(z, seed=1)),
    }
    return Case(calls, (z,), z.nbytes, 0, logits_bytes=z.nbytes)


def linear_sample(group: Group) -> Case:
    """The same from a head, whose logits ours never has whole; "gemm" is the arithmetic alone."""
    x, w, _ = common.head(group)
    n, d, v = group.shape
    out = x.new_empty(n, v)

    def torch_sample() -> Tensor:
        return torch.multinomial(torch.softmax((x @ w.T).float(), 1), 1)

    calls: dict[str, Call] = {
        "torch": torch_sample,
        "gemm": lambda: torch.mm(x, w.T, out=out),
        **ours(group.device, lambda: fastloss.linear_sample(x, w, seed=1)),
    }
    return Case(calls, (x, w), x.nbytes + w.nbytes, 2 * n * d * v, logits_bytes=n * v * x.element_size())


def pointwise(group: Group) -> Case:
    """A loss of torch.nn.functional on logits or log-probabilities [N, V] and targets of the same shape."""
    z, _ = common.logits(group)
    if group.op == "kl_div":
        x, more = z.log_softmax(1), {"reduction": "batchmean"}
        t = torch.randn_like(z).softmax(1)
    else:
        x, t, more = z, torch.rand_like(z), {}
    theirs, mine = (getattr(module, group.op) for module in (F, fastloss.functional))
    fast = compiled(lambda x: theirs(x, t, **more))
    step = training_step if group.mode == "forward+backward" else lambda loss, *leaves: loss
    if group.mode == "forward+backward":
        x.requires_grad_()
    calls = {
        "torch": step(lambda: theirs(x, t, **more), x),
        "torch_compile": step(lambda: fast(x), x),
        **ours(group.device, step(lambda: mine(x, t, **more), x)),
    }
    size, gradient = z.nbytes, z.nbytes if group.mode == "forward+backward" else 0
    return Case(calls, (x, t), 2 * size + gradient, 0, gradient_bytes=gradient, logits_bytes=size)


def pair_gemms(q: Tensor, k: Tensor) -> Call:
    """The arithmetic of a contrastive step that stores no similarities: S twice, dQ and dK, into memory that is there."""
    buffers: list[Tensor] = []

    def call() -> None:
        if not buffers:
            buffers.extend((q.new_empty(len(q), len(k)), torch.empty_like(q), torch.empty_like(k)))
        s, dq, dk = buffers
        torch.mm(q, k.T, out=s)
        torch.mm(q, k.T, out=s)
        torch.mm(s, k, out=dq)
        torch.mm(s.T, q, out=dk)

    return call


def clip(group: Group) -> Case:
    """CLIP's loss of unit embeddings [B, D] with a trained scale, both directions. "torch" is open_clip's formula."""
    b, d = group.shape
    q, k = common.views(group)
    scale = torch.tensor(20.0, device=group.device, requires_grad=True)
    q.requires_grad_()
    k.requires_grad_()

    def eager(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        rows, columns = scale.to(q.dtype) * q @ k.T, scale.to(q.dtype) * k @ q.T
        own = torch.arange(len(q), device=q.device)
        return (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2

    fast = compiled(eager)
    calls: dict[str, Call] = {
        "four_gemms": pair_gemms(q.detach(), k.detach()),
        "torch": training_step(lambda: eager(q, k, scale), q, k, scale),
        "torch_compile": training_step(lambda: fast(q, k, scale), q, k, scale),
        **ours(group.device, training_step(lambda: fastloss.contrastive.clip_loss(q, k, scale), q, k, scale)),
    }
    gradients = q.nbytes + k.nbytes
    return Case(
        calls, (q, k, scale), 2 * gradients, 8 * b * b * d, gradient_bytes=gradients,
        logits_bytes=b * b * q.element_size(),
    )  # fmt: skip


CASES: dict[str, Callable[[Group], Case]] = {
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "distillation": distillation,
    "row_stats": row_stats,
    "focal": focal,
    "margin": margin,
    "region": region,
    "sample": sample,
    "linear_sample": linear_sample,
    "binary_cross_entropy_with_logits": pointwise,
    "kl_div": pointwise,
    "clip": clip,
}


def build(group: Group) -> Case:
    # These add theirs to CASES, and need what is above.
    import binarizers  # noqa: F401
    import bit_implementations  # noqa: F401
    import packed_layers  # noqa: F401
    import quantisers  # noqa: F401
    import weight_codecs  # noqa: F401

    return CASES[group.op](group)
