"""Recurrent binarisation of embeddings, its loss, and search by symmetric distances (BEBR)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pairs import Diagonal, SameId, edge_dot, row_topk
from ..bgemm import check_product
from ..binarize import binarize
from ..bit_tensor import BitTensor, check_bits
from ..bits import pack_codes, unpack_bits
from ..hamming_topk import hamming_topk

#: A BitTensor has at most so many planes.
_MOST = 4
#: Rows that are unpacked at a time to find their norms.
_ROWS = 4096


def _perceptron(inside: int, hidden: int, outside: int, identity: bool) -> nn.Sequential:
    first, last = nn.Linear(inside, hidden), nn.Linear(hidden, outside)
    if identity:  # relu(u) - relu(-u) = u, of u = (x - mean) / std by the BatchNorm between them
        with torch.no_grad():
            for layer, rows, columns in ((first, hidden, inside), (last, outside, hidden)):
                layer.bias.zero_()
                layer.weight.zero_()
                both = torch.cat((torch.eye(inside), -torch.eye(inside)), int(rows < columns))
                layer.weight[: both.shape[0], : both.shape[1]] = both
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), last)


class RecurrentBinarizer(nn.Module):
    """Embeddings into codes of 1 + steps bits a number: each step adds the sign of what the bits so far leave over.

        b_0 = sign(W(x));   f_i = B_i(b_i) / |B_i(b_i)|,   b_(i+1) = b_i + 2^-(i+1) sign(R_i(x - f_i)),   i < steps

    W, B_i, R_i: Linear, BatchNorm, ReLU, Linear. sign has the gradient of clip(u, -1, 1). With one step a number is one
    of -1.5, -0.5, 0.5, 1.5.

    Args:
        features: D of the embeddings. code_features: numbers of a code (None: D). hidden: of the perceptrons.
        steps: 0 to 3.
        identity: start with perceptrons that only standardise what they get: codes are then the numbers less their mean,
            rounded, and training improves them (not of the paper; hidden units beyond 2 D start at 0 and stay there).

    Source: "Binary Embedding-based Retrieval at Tencent" (one step, 512 features, 2048 hidden).
    """

    def __init__(
        self, features: int, code_features: int | None = None, hidden: int = 2048, steps: int = 1, *,
        identity: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        codes = features if code_features is None else code_features
        for name, value in (("features", features), ("code_features", codes), ("hidden", hidden)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(steps, int) or not 0 <= steps < _MOST:
            raise ValueError(f"steps must be 0 to {_MOST - 1}, got {steps!r}")
        if identity and (codes != features or hidden < 2 * features):
            raise ValueError(
                f"identity needs code_features = features and hidden >= 2 features, got {codes}, {features} and {hidden}"
            )
        self.features, self.code_features, self.steps = features, codes, steps
        self.binarized = _perceptron(features, hidden, codes, identity)
        self.restored = nn.ModuleList(_perceptron(codes, hidden, features, identity) for _ in range(steps))
        self.residual = nn.ModuleList(_perceptron(features, hidden, codes, identity) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] -> codes [M, code_features] as numbers, differentiable."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must be [M, {self.features}], got {list(x.shape)}")
        b = _sign(self.binarized(x))
        for i, (restored, residual) in enumerate(zip(self.restored, self.residual, strict=True)):
            left = x - F.normalize(restored(b), dim=1)
            b = b + 2.0 ** -(i + 1) * _sign(residual(left))
        return b

    @torch.no_grad()
    def encode(self, x: Tensor) -> BitTensor:
        """The codes [M, code_features] packed: steps + 1 planes, odd levels. RuntimeError unless in eval mode: a code must
        not depend on the others of its batch."""
        if self.training:
            raise RuntimeError("encode takes a module in eval mode: call .eval() first")
        return pack_recurrent(self(x), self.steps)


def _sign(x: Tensor) -> Tensor:
    y = binarize(x, "clip")
    assert isinstance(y, Tensor)
    return y


def pack_recurrent(codes: Tensor, steps: int = 1) -> BitTensor:
    """Numbers b_0 + b_1 / 2 + .. + b_steps / 2^steps of signs b, [..., K], as a BitTensor of odd levels times 2^-steps.

    Any other numbers go to the nearest code: embeddings whose standard deviation is about 1 can be packed as they are.
    ValueError for steps not in 0..3.
    """
    if not isinstance(steps, int) or not 0 <= steps < _MOST:
        raise ValueError(f"steps must be 0 to {_MOST - 1}, got {steps!r}")
    return pack_codes(codes, 2.0 ** (1 - steps), steps + 1, odd=True)


def inverse_norms(codes: BitTensor) -> Tensor:
    """1 / |row| of the integers of a BitTensor (without its scale), float32 [R]; 0 for a row of zeros.

    Of documents it is made once, and kept beside the codes for `symmetric_distance_topk`.
    """
    check_bits("codes", codes)
    planes, popcounts = codes.flat()
    squares = []
    for r in range(0, codes.rows, _ROWS):
        part = codes._replace(planes=planes[:, r : r + _ROWS], popcounts=popcounts[:, r : r + _ROWS], scale=None)
        squares.append(unpack_bits(part, torch.float32).double().square().sum(1))
    norms = torch.cat(squares).sqrt() if squares else torch.empty(0, device=codes.device, dtype=torch.float64)
    return torch.where(norms > 0, 1 / norms, 0.0).float()


def symmetric_distance_topk(
    queries: BitTensor, documents: BitTensor, count: int, document_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` documents with the largest cosine to each query, by products of bits: (cosines, index) [M, count].

        cos(a, b) = (sum_k a_k b_k) / (|a| |b|),   the sum an exact integer

    The matrix of scores is not stored. Equal scores in the order of the documents.

    Args:
        queries: [M, K]; documents: [N, K], both packed (`pack_bits`, `pack_codes`, `RecurrentBinarizer.encode`); with
            scales of rows or none, which a cosine does not depend on.
        count: 1 to N.
        document_norms: float32 [N], `inverse_norms(documents)`, so that it is not made at every search.

    Raises ValueError and TypeError. It takes the place of the symmetric distance calculation of "Binary Embedding-based
    Retrieval at Tencent": theirs looks the same sum up in tables.
    """
    check_product(queries, documents)
    for name, bits in (("queries", queries), ("documents", documents)):
        if bits.scale is not None and bits.scale.shape[1] != 1:
            raise ValueError(f"{name} must have one scale a row, got groups of {bits.group} columns")
    norms = inverse_norms(documents) if document_norms is None else document_norms
    plain = (queries._replace(scale=None), documents._replace(scale=None))
    scores, index = hamming_topk(*plain, count, inverse_norms=norms)
    return scores * inverse_norms(queries).reshape(*queries.shape[:-1], 1), index


def recurrent_binarizer_loss(
    queries: Tensor, documents: Tensor, temperature: float = 0.05, *, hard: int = 5, ids: Tensor | None = None
) -> Tensor:
    """InfoNCE of cosines among the positive and the `hard` nearest negatives, the mean of both directions.

        L_i = -log( e^(s_ii / t) / (e^(s_ii / t) + sum over the hard nearest j of e^(s_ij / t)) ),  s_ij = cos(q_i, d_j)

    The similarities of all pairs are not stored; which negatives are nearest has no gradient.

    Args:
        queries, documents: [M, D], row i of both belongs together; codes (`RecurrentBinarizer`) or embeddings.
        temperature: t > 0. hard: how many negatives a row, at least 1; fewer where there are no more.
        ids: integers [M]: rows with one id are no negatives of each other.

    Raises ValueError and TypeError. Source: "Binary Embedding-based Retrieval at Tencent".
    """
    if queries.dim() != 2 or queries.shape != documents.shape or not queries.shape[0]:
        raise ValueError(
            f"queries and documents must both be [M, D], got {list(queries.shape)} and {list(documents.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not isinstance(hard, int) or hard < 1:
        raise ValueError(f"hard must be an integer >= 1, got {hard!r}")
    if ids is not None and ids.shape != (queries.shape[0],):
        raise ValueError(f"ids must be [{queries.shape[0]}], got {list(ids.shape)}")
    q, d = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    positive = (q * d).sum(1)
    parts = [_one_way(a, b, positive, temperature, min(hard, len(q)), ids) for a, b in ((q, d), (d, q))]
    return (parts[0] + parts[1]) / 2


def _one_way(q: Tensor, d: Tensor, positive: Tensor, temperature: float, hard: int, ids: Tensor | None) -> Tensor:
    same = Diagonal() if ids is None else SameId(ids, ids)
    columns = row_topk(q.detach(), d.detach(), hard, positive=None, excluded=same).columns
    rows = torch.arange(len(q), device=q.device).repeat_interleave(hard)
    negative = edge_dot(q, d, rows, columns.clamp(min=0).reshape(-1)).reshape(-1, hard)
    negative = torch.where(columns >= 0, negative, -torch.inf)
    scores = torch.cat((positive[:, None].to(negative.dtype), negative), 1) / temperature
    return (scores.logsumexp(1) - scores[:, 0]).mean()
