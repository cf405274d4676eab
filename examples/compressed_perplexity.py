"""The perplexity of a language model whose weights stay compressed, its head never dense.

    python examples/compressed_perplexity.py          # half a minute on two CPU cores

A small transformer (that of language_model.py, its head tied to its embedding) is trained for a few steps on the source of
Python's standard library, converted to bf16 and compressed:

    fastloss.lossless.compress_model(model)
    loss = fastloss.linear_cross_entropy(features, model.head.compressed_weight, target)

The head's rows are decoded a chunk at a time: their logits join each position's running sums and are gone. Printed: bytes of
the weights, and the perplexity on held-out text with dense weights and with compressed ones, within a limit of
extra memory that the dense head alone would exceed.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from language_model import LanguageModel, read_text
from torch import Tensor

import fastloss
from fastloss.lossless import CompressedLinear, compress_model

CONTEXT = 64


def batches(text: Tensor, count: int, rows: int) -> Tensor:
    """`count` batches of windows [rows, CONTEXT + 1], drawn at random."""
    starts = torch.randint(len(text) - CONTEXT - 1, (count, rows, 1), generator=torch.Generator().manual_seed(0))
    return text[starts + torch.arange(CONTEXT + 1)]


def train(model: LanguageModel, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for window in batches(text, steps, 16):
        optimizer.zero_grad()
        features = model(window[:, :-1])
        fastloss.linear_cross_entropy(features, model.head.weight, window[:, 1:].flatten()).backward()
        optimizer.step()


@torch.no_grad()
def perplexity(model: LanguageModel, text: Tensor, limit: int) -> float:
    """exp of the mean loss; `limit`: extra bytes of the head."""
    window = batches(text, 1, 32)[0]
    head = model.head.compressed_weight if isinstance(model.head, CompressedLinear) else model.head.weight
    target = window[:, 1:].flatten()
    loss = fastloss.linear_cross_entropy(model(window[:, :-1]), head, target, max_extra_bytes=limit)
    return math.exp(float(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8000, help="size of the vocabulary")
    parser.add_argument("--width", type=int, default=128, help="of the transformer")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    o = parser.parse_args()
    torch.manual_seed(0)
    text, vocab, _ = read_text(o.vocab)
    held_out = len(text) // 10
    model = LanguageModel(vocab, o.width, CONTEXT)
    train(model, text[:-held_out], o.steps)
    dense = copy.deepcopy(model).bfloat16().eval()
    report = compress_model(copy.deepcopy(dense), min_bytes=4096)
    limit = dense.head.weight.nbytes // 4
    print(f"weights of {len(report.compressed)} layers: {report.before} -> {report.after} bytes, "
          f"{100 * report.after / report.before:.1f} %; the head {dense.head.weight.nbytes} bytes, within {limit}")  # fmt: skip
    for name, variant in (("dense", dense), ("compressed", report.model)):
        print(f"perplexity, {name:10s} {perplexity(variant, text[-held_out:], limit):.3f}")


if __name__ == "__main__":
    main()
