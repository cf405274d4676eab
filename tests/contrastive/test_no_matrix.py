"""What the losses keep for their backward: vectors and embeddings, nothing of the size of a similarity matrix."""

from __future__ import annotations

import pytest
import torch

from fastloss import contrastive

B, D = 600, 8
LABELS = torch.arange(B) % 300
EDGES = (torch.arange(B), torch.arange(B).flip(0))
INDEX = torch.arange(B)
DIRECTIONS = ("q_to_k", "k_to_q", "q_to_q", "k_to_k")


def guide(q, k):
    return contrastive.GuideEmbeddings(q.detach()[:, :4], k.detach()[:, :4])


LOSSES = {
    "info_nce": lambda q, k: contrastive.info_nce(
        q, k, directions=DIRECTIONS, own_margin=0.1, hardness_mode="in_batch"
    ),
    "gist_embed": lambda q, k: contrastive.gist_embed_loss(q, k, guide(q, k)),
    "ids": lambda q, k: contrastive.info_nce(q, k, query_ids=LABELS, document_ids=INDEX),
    "ntxent": lambda q, k: contrastive.ntxent_loss(q, k, bank=q),
    "dcl": lambda q, k: contrastive.dcl_loss(q, k, weighted=True),
    "macl": contrastive.macl_loss,
    "hcl": contrastive.hcl_loss,
    "dual_temperature": contrastive.dual_temperature_loss,
    "hard_quantile": lambda q, k: contrastive.hard_quantile_loss(q, k, fraction=0.5),
    "n_pairs": contrastive.n_pairs_loss,
    "moco": lambda q, k: contrastive.moco_loss(q, k, k, labels=LABELS, queue_labels=LABELS),
    "supcon": lambda q, k: contrastive.supcon_loss(q, LABELS, k, LABELS),
    "focal_supcon": lambda q, k: contrastive.focal_supcon_loss(torch.cat((q, k)), LABELS.repeat(2)),
    "modular": lambda q, k: contrastive.modular_contrastive_loss(q, k, INDEX, 10.0, negatives=k, negative_owner=INDEX),
    "decoupled_softmax": lambda q, k: contrastive.decoupled_softmax_loss(q, k, *EDGES),
    "soft_topk": lambda q, k: contrastive.soft_topk_loss(q, k, *EDGES, normalize=True),
    "focal_info_nce": contrastive.focal_info_nce,
    "sogclr": lambda q, k: contrastive.SogCLRLoss(B)(q, k, INDEX),
    "isogclr": lambda q, k: contrastive.ISogCLRLoss(B, modality="bimodal")(q, k, INDEX),
    "cacr": lambda q, k: contrastive.cacr_loss([q, k]),
    "amcl": lambda q, k: contrastive.amcl_loss(q[:, None], k[:, None], lambda a, b: torch.ones(len(a)), beta=0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_the_size_of_the_matrix_is_kept(name):
    q, k = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = LOSSES[name](q, k)
    assert max(saved) <= 4 * B * D < B * B / 16
    loss.backward()
    assert loss.isfinite() and q.grad.isfinite().all() and q.grad.abs().max() > 0
