"""Distil a small language model from a larger one whose logits are never stored.

    python examples/distillation.py            # about a minute on two CPU cores
    python examples/distillation.py --help

A teacher is trained on the source of Python's standard library. Two students of the same size then see the same batches:
one learns from the next token alone, one also from the teacher, by

    fastloss.linear_row_loss(hidden, head, target, losses.knowledge_distillation, teacher=TeacherHead(t_hidden, t_head))

which streams both vocabularies. The last lines compare one step with the same loss on logits that are stored.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from language_model import LanguageModel, read_text
from torch import Tensor

import fastloss
from fastloss import TeacherHead, losses


def batches(text: Tensor, steps: int, batch: int, context: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(ids [B, T], next tokens [B * T]) of random places."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        starts = torch.randint(len(text) - context - 1, (batch,), generator=generator).tolist()
        rows = torch.stack([text[s : s + context + 1] for s in starts])
        made.append((rows[:, :-1], rows[:, 1:].flatten()))
    return made


def train(
    model: LanguageModel, data: list[tuple[Tensor, Tensor]], teacher: LanguageModel | None, o: argparse.Namespace
) -> None:
    """Train on the next token, and on the teacher where there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr)
    for ids, target in data:
        hidden = model(ids)
        if teacher is None:
            loss = fastloss.linear_cross_entropy(hidden, model.head.weight, target)
        else:
            with torch.no_grad():
                known = TeacherHead(teacher(ids), teacher.head.weight.detach())
            loss = fastloss.linear_row_loss(
                hidden, model.head.weight, target, losses.knowledge_distillation, teacher=known, alpha=o.alpha,
                temperature=o.temperature,
            )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: LanguageModel, data: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss of held-out batches, in nats a token."""
    return sum(float(fastloss.linear_cross_entropy(model(i), model.head.weight, t)) for i, t in data) / len(data)


def stored(
    hidden: Tensor, weight: Tensor, target: Tensor, t_hidden: Tensor, t_weight: Tensor, o: argparse.Namespace
) -> Tensor:
    """The same loss in plain PyTorch: both matrices of logits, and what autograd keeps of them."""
    z, t = hidden @ weight.T, t_hidden @ t_weight.T
    log_p, log_q = (F.log_softmax(x / o.temperature, -1) for x in (z, t))
    soft = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (1 - o.alpha) * F.cross_entropy(z, target) + o.alpha * o.temperature**2 * soft


def compare(student: LanguageModel, teacher: LanguageModel, ids: Tensor, target: Tensor, o: argparse.Namespace) -> None:
    """Loss, gradient and time of one step of the head, stored and streamed."""
    with torch.no_grad():
        hidden, t_hidden = student(ids), teacher(ids)
    weight, t_weight = student.head.weight, teacher.head.weight.detach()

    def streamed() -> Tensor:
        return fastloss.linear_row_loss(
            hidden, weight, target, losses.knowledge_distillation, teacher=TeacherHead(t_hidden, t_weight),
            alpha=o.alpha, temperature=o.temperature,
        )  # fmt: skip

    found = {}
    ways = {"stored": lambda: stored(hidden, weight, target, t_hidden, t_weight, o), "streamed": streamed}
    for name, loss_of in ways.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            loss = loss_of()
            (gradient,) = torch.autograd.grad(loss, weight)
            times.append(time.perf_counter() - start)
        found[name] = gradient
        print(f"one step of the head, {name:8s}: loss {loss.item():.5f}, {1e3 * sorted(times)[1]:7.1f} ms")
    gap = (found["stored"] - found["streamed"]).norm() / found["stored"].norm()
    mib = 2 * len(target) * len(weight) * 4 / 2**20
    print(f"gradients differ by {float(gap):.1e} relative; the logits of student and teacher would be {mib:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=48, help="of the student; the teacher's is four times that")
    parser.add_argument("--alpha", type=float, default=0.7, help="weight of the teacher")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.manual_seed(o.seed)
    text, vocab, files = read_text(o.vocab)
    held = len(text) // 20
    print(f"{len(text):,} tokens of {files} files, vocabulary {vocab:,}")
    test = batches(text[-held:], 4, o.batch, o.context, o.seed + 1)
    teacher = LanguageModel(vocab, 4 * o.width, o.context)
    train(teacher, batches(text[:-held], 2 * o.steps, o.batch, o.context, o.seed + 2), None, o)
    print(f"teacher, width {4 * o.width}: held-out loss {evaluate(teacher, test):.3f}")
    data = batches(text[:-held], o.steps, o.batch, o.context, o.seed + 3)
    for name, known in (("next token alone", None), ("and the teacher", teacher)):
        torch.manual_seed(o.seed)
        student = LanguageModel(vocab, o.width, o.context)
        train(student, data, known, o)
        print(f"student, width {o.width}, {name:16s}: held-out loss {evaluate(student, test):.3f}")
    compare(student, teacher, *data[0], o)


if __name__ == "__main__":
    main()
