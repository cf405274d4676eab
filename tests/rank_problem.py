"""What each process of a small group computes for tests/contrastive/test_distributed.py: losses and gradients of its
own rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from _pytest.outcomes import Skipped
from torch import Tensor

from fastloss.compat import grad_cache, lightly, open_clip, sentence_transformers
from fastloss.contrastive.distributed import gather_keys
from peers import module_of

RANKS, ROWS, DIM = 2, 5, 6
CLIP_MODES = [(local, gradient) for local in (False, True) for gradient in (False, True)]
EXCHANGES = ["bidir", "shift", "reduce", "gather"]
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
MNRL = {
    "plain": {},
    "symmetric": {"directions": FOUR[::2], "partition_mode": "per_direction"},
    "four": {"directions": FOUR},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
    "in batch": {"directions": FOUR, "hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
}
GIST = {
    "gist": {"temperature": 0.1},
    "gist without anchors": {"temperature": 0.1, "contrast_anchors": False, "margin": 0.1},
}


def whole(columns: int, seed: int = 0, dim: int = DIM) -> list[Tensor]:
    """The embeddings of all ranks, the same in every process."""
    torch.manual_seed(seed)
    return [torch.randn(RANKS * ROWS, dim, dtype=torch.float64) for _ in range(columns)]


def own(tensors: list[Tensor], rank: int) -> list[Tensor]:
    """This rank's rows, as leaves."""
    return [x[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_() for x in tensors]


def result(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """[the loss, its gradients]."""
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))]


def _open_clip(rank: int, losses: Any) -> dict[Any, list[Tensor]]:
    found = {}
    for local, gradient in CLIP_MODES:
        x, scale = own(whole(2), rank), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss = losses.ClipLoss(local, gradient, rank=rank, world_size=RANKS)
        found["clip", local, gradient] = result(loss(*x, scale), [*x, scale])
    for exchange in EXCHANGES:
        x, scale = own(whole(2), rank), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        loss = losses.SigLipLoss(rank=rank, world_size=RANKS, dist_impl=exchange)
        found["siglip", exchange] = result(loss(*x, scale, bias), [*x, scale, bias])
    return found


def _lightly(rank: int, ntxent: Any, dcl: Any) -> dict[Any, list[Tensor]]:
    found = {}
    for loss in (ntxent.NTXentLoss(0.3, gather_distributed=True), dcl.DCLLoss(gather_distributed=True),
                 dcl.DCLWLoss(gather_distributed=True)):  # fmt: skip
        x = own(whole(2), rank)
        found[type(loss).__name__] = result(loss(*x), x)
    torch.manual_seed(3)
    loss = ntxent.NTXentLoss(0.3, memory_bank_size=(17, DIM), gather_distributed=True)
    for step in range(3):
        x = [t.detach().float().requires_grad_() for t in own(whole(2, step), rank)]  # the library's bank is float32
        found["bank", step] = [*result(loss(*x), x), loss.memory_bank.bank.clone()]
    return found


def _mnrl(rank: int, loss_class: Any) -> dict[Any, list[Tensor]]:
    found = {}
    for name, options in MNRL.items():
        x = own(whole(3), rank)
        loss = loss_class(None, gather_across_devices=True, **options)
        found[name] = result(loss.compute_loss_from_embeddings(x, None), x)
    return found


class _Given(torch.nn.Module):
    """A model whose embeddings are given as features."""

    max_seq_length = 8

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["x"]}


class _Guide(_Given):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["guide"]}


def _gist(rank: int, loss_class: Any) -> dict[Any, list[Tensor]]:
    found = {}
    for name, options in GIST.items():
        x, guides = own(whole(3), rank), own(whole(3, 9, 3), rank)
        features = [{"x": a, "guide": g} for a, g in zip(x, guides, strict=True)]
        loss = loss_class(_Given(), _Guide(), gather_across_devices=True, **options)
        found[name] = result(loss(features, None), x)
    return found


def _grad_cache(rank: int, loss_class: Any) -> dict[Any, list[Tensor]]:
    queries, documents = whole(1)[0], torch.cat(whole(2, 5))
    x = [
        queries[rank * ROWS :][:ROWS].clone().requires_grad_(),
        documents[2 * rank * ROWS :][: 2 * ROWS].clone().requires_grad_(),
    ]
    return {"grad cache": result(loss_class(1)(*x), x)}


def _errors(rank: int) -> dict[Any, list[str]]:
    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except (ValueError, TypeError) as error:
            return str(error)
        return "no error"

    x = torch.randn(2, 3)
    return {
        "uneven": [message(lambda: gather_keys(torch.randn(2 + rank, 3)))],
        "place": [message(lambda: open_clip.ClipLoss(rank=1 - rank, world_size=RANKS)(x, x, 1.0))],
        "target": [message(lambda: grad_cache.DistributedContrastiveLoss()(x, x, target=torch.arange(2)))],
    }


def _libraries(rank: int) -> dict[Any, list[Tensor]]:
    """The same by the libraries that are installed."""
    found: dict[Any, list[Tensor]] = {}

    def with_grad(x: Tensor) -> Tensor:
        return torch.cat(torch.distributed.nn.all_gather(x))

    def without_grad(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    def lightly_file(name: str) -> Any:
        return module_of(f"lightly.loss.{name}", {"lightly.models.utils": {"concat_all_gather": without_grad}})

    def sentence_transformers_file(name: str) -> Any:
        folder = "sentence_transformers.sentence_transformer"
        stand_ins = {
            "transformers": {"PreTrainedTokenizerBase": torch.nn.Module},
            "sentence_transformers.util": {
                "cos_sim": None, "similarity_fct_name": None, "batch_to_device": None, "get_rank": dist.get_rank,
                "all_gather_with_grad": with_grad,
            },
            "sentence_transformers.base.losses.merged_forward": {
                "embed_columns": lambda model, features: [model(f)["sentence_embedding"] for f in features]
            },
            f"{folder}.model": {"SentenceTransformer": object},
            f"{folder}.modules": {"StaticEmbedding": object},
        }  # fmt: skip
        return module_of(f"{folder}.losses.{name}", stand_ins)

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
        return a @ b.t()

    def mnrl() -> Any:
        made = sentence_transformers_file("multiple_negatives_ranking").MultipleNegativesRankingLoss
        return lambda model, **options: made(model, similarity_fct=cosines, **options)

    for library in (
        lambda: _open_clip(rank, module_of("open_clip.loss")),
        lambda: _lightly(rank, lightly_file("ntx_ent_loss"), lightly_file("dcl_loss")),
        lambda: _mnrl(rank, mnrl()),
        lambda: _gist(rank, sentence_transformers_file("gist_embed").GISTEmbedLoss),
    ):
        try:
            found.update(library())
        except Skipped:  # not installed, in no process
            continue
    return found


def run(rank: int, folder: str) -> None:
    """One process: everything above, saved as folder/<rank>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    ours = {
        **_open_clip(rank, open_clip),
        **_lightly(rank, lightly, lightly),
        **_mnrl(rank, sentence_transformers.MultipleNegativesRankingLoss),
        **_gist(rank, sentence_transformers.GISTEmbedLoss),
        **_grad_cache(rank, grad_cache.DistributedContrastiveLoss),
    }
    x = own(whole(1), rank)[0]
    twice = torch.autograd.grad(gather_keys(x).pow(3).sum(), x, create_graph=True)[0]
    ours["gather"] = [gather_keys(x).detach(), twice.detach(), *torch.autograd.grad(twice.sum(), x)]
    torch.save({"ours": ours, "libraries": _libraries(rank), "errors": _errors(rank)}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
