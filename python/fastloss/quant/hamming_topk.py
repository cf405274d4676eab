"""The nearest codes of a database, without the matrix of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .bgemm import check_product, product_arguments
from .bit_tensor import BitTensor

_ops = torch.ops.fastloss


def _is_binary(bits: BitTensor) -> bool:
    return bits.weights == (2,) and bits.offset == -1


def _row_scale(database: BitTensor, inverse_norms: Tensor | None) -> Tensor | None:
    """What the sums of each row are multiplied by, float32 [N], or None."""
    scale = database.scale
    if scale is not None and scale.shape[1] != 1:
        raise ValueError(f"database must have one scale a row, got groups of {database.group} columns")
    if inverse_norms is not None and (
        not inverse_norms.is_floating_point()
        or inverse_norms.shape != (database.rows,)
        or inverse_norms.device != database.device
    ):
        raise ValueError(
            f"inverse_norms must be floating [{database.rows}] on {database.device}, got {inverse_norms.dtype} "
            f"{list(inverse_norms.shape)} on {inverse_norms.device}"
        )
    if scale is None:
        return None if inverse_norms is None else inverse_norms.detach().float()
    per_row = scale.detach().float().reshape(-1).expand(database.rows)
    return per_row if inverse_norms is None else per_row * inverse_norms.detach().float()


def hamming_topk(
    queries: BitTensor, database: BitTensor, count: int, *, inverse_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` rows of `database` nearest to each query, and how near they are.

    Binary codes without scales: Hamming distances, rising, int32. Other codes, or with scales: scores, falling,

        s_ij = (sum_k q_ik d_jk) scale_j inverse_norms_j,   the sum an exact int32, the rest in float32

    in int32 where there is neither. Equal ones come in the order of the database. The matrix [M, N] is not stored.
    With codes of 2 bits and `inverse_norms` this is the symmetric distance calculation of "Binary Embedding-based
    Retrieval at Tencent", up to the norm of the query, which does not change the order.

    Args:
        queries: [..., K]; their scale is left out. database: [N, K], scales of rows or none.
        count: 1 to N.
        inverse_norms: float32 [N], 1 / |row| of the database's integers, or anything else that its scores are to be
            multiplied by. A NaN comes first.

    Returns:
        distances or scores, and the rows they belong to, int64; both [..., count]. No gradient.

    Raises ValueError and TypeError.
    """
    check_product(queries, database)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= database.rows:
        raise ValueError(f"count must be 1 to {database.rows}, the rows of the database, got {count!r}")
    scale = _row_scale(database, inverse_norms)
    found, index = _ops.hamming_topk.default(*product_arguments(queries, database), scale, count)
    if scale is None and _is_binary(queries) and _is_binary(database):
        found = (queries.columns - found) // 2
    lead = queries.shape[:-1]
    return found.reshape(*lead, count), index.reshape(*lead, count)
