"""Contrastive losses of graphs: PamC, whose negatives are the clusters and whose positives are edges."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import catalogue
from ..pairs import edge_dot
from .arguments import check_labels, check_scale, unit, wide


@catalogue.entry(
    formula="-mean_i log(sum over edges (i, j) of A_ij e^(tau cos(z_i, z_j)) + eps) + mean_c log(sum_c' e^(tau "
    "cos(m_c, m_c')) + eps), m_c = sum of z in cluster c, each with itself counted as cosine 0",
    gradient="-A_ij tau e^(tau cos) / (sum + eps) / B along edges; tau softmax / C among the clusters",
    source="Efficient block contrastive learning via parameter-free meta-node approximation",
    published="an empty cluster makes NaN (division by its norm); here its cosines are 0. tau 1, neighbours of order "
    "2, weight 2.0",
)
def pamc_loss(
    z: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, clusters: Tensor, num_clusters: int, *, tau: float = 1.0,
    eps: float = 1e-10,
) -> Tensor:  # fmt: skip
    """PamC: neighbours in the graph attract, clusters repel each other through their sums ("meta-nodes").

    Args:
        z: node embeddings [B, D]. rows, columns, weights: the edges of the adjacency A^r, [E] each; (i, i) counts as cosine 0.
        clusters: integers [B] in [0, num_clusters), a fixed assignment, such as q.argmax(1).
        tau: factor of the cosines, > 0. eps: > 0.

    Raises ValueError, TypeError, and on a CPU IndexError for ids out of range. Memory: O(B D + E + C^2).
    Source: Efficient block contrastive learning via parameter-free meta-node approximation.
    """
    check_labels(z, clusters, "clusters")
    check_scale("tau", tau)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be finite and > 0, got {eps}")
    if weights.shape != rows.shape:
        raise ValueError(f"weights must have shape {list(rows.shape)}, got {list(weights.shape)}")
    if clusters.device.type == "cpu" and clusters.numel():
        low, high = (int(c) for c in clusters.aminmax())
        if low < 0 or high >= num_clusters:
            raise IndexError(f"clusters must be in [0, {num_clusters}), got ids from {low} to {high}")
    z = wide(z)
    unit_z = unit(z)
    cosine = torch.where(rows == columns, 0.0, edge_dot(unit_z, unit_z, rows, columns))
    attraction = z.new_zeros(z.shape[0]).index_add(0, rows.long(), weights.to(z.dtype) * (tau * cosine).exp())
    centre = unit(z.new_zeros(num_clusters, z.shape[1]).index_add(0, clusters.long(), z))
    between = (centre @ centre.t()).masked_fill(torch.eye(num_clusters, dtype=torch.bool, device=z.device), 0.0)
    repulsion = (tau * between).exp().sum(1)
    return (repulsion + eps).log().mean() - (attraction + eps).log().mean()
