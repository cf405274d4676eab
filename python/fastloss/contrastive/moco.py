"""MoCo: a queue of past keys as negatives, on the device, and the loss against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import catalogue
from ..pairs import SameId, pair_stats
from ..pairs.arguments import Temperature
from .dots import check_pair, finite_softplus, own_similarity, scale_of, unit
from .reduction import check_reduction, reduce


class Queue(nn.Module):
    """The last `size` vectors that were enqueued, a ring of buffers on the device; nothing here waits for it.

        queue = Queue(65536, 128)
        loss = moco_loss(q, k, queue.vectors, queue_valid=queue.valid)
        loss.backward()
        queue.enqueue(k)          # after the query, and after its backward: vectors are overwritten in place

    Args:
        size: how many vectors; dim: their dimension D.
        labels: whether each has an integer beside it (`queue.labels`, -1 where nothing is filled).
        normalize: divide by the norm on the way in.
        dtype, device: of the vectors.

    Buffers, all in the state_dict: vectors [size, D], position [] (the next place), filled [] and labels [size]. Any batch
    size: where a batch does not divide the size it goes on at the start of the ring, and of a batch larger than the queue the
    last `size` vectors stay.
    """

    vectors: Tensor
    position: Tensor
    filled: Tensor
    labels: Tensor | None

    def __init__(
        self, size: int, dim: int, *, labels: bool = False, normalize: bool = True, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.normalize = normalize
        self.register_buffer("vectors", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("labels", torch.full((size,), -1, dtype=torch.int64, device=device) if labels else None)

    @property
    def size(self) -> int:
        """How many vectors there is place for."""
        return self.vectors.shape[0]

    @property
    def valid(self) -> Tensor:
        """bool [size]: the places that are filled."""
        return torch.arange(self.size, device=self.vectors.device) < self.filled

    @torch.no_grad()
    def enqueue(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Put x [n, D] (and labels [n]) over the oldest vectors. Raises ValueError for other shapes."""
        if x.dim() != 2 or x.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"expected vectors [n, {self.vectors.shape[1]}], got {list(x.shape)}")
        if (labels is None) != (self.labels is None):
            raise ValueError(
                f"the queue was made with labels={self.labels is not None}, got labels={labels is not None}"
            )
        n, size = x.shape[0], self.size
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"labels must have shape [{n}], got {list(labels.shape)}")
        kept = min(n, size)
        if self.normalize:
            x = unit(x)
        place = (self.position + torch.arange(n - kept, n, device=self.vectors.device)) % size
        self.vectors.index_copy_(0, place, x[n - kept :].to(self.vectors))
        if self.labels is not None and labels is not None:
            self.labels.index_copy_(0, place, labels[n - kept :].to(self.labels))
        self.position.add_(n).remainder_(size)
        self.filled.add_(n).clamp_(max=size)

    def extra_repr(self) -> str:
        """Size, dimension, labels."""
        return f"{self.size}, {self.vectors.shape[1]}, labels={self.labels is not None}, normalize={self.normalize}"


def _check_same_label(same_label: str) -> None:
    if same_label not in ("positive", "exclude"):
        raise ValueError(f"same_label must be positive or exclude, got {same_label!r}")


@catalogue.entry(
    formula="mean of -log e^(s_i / tau) / (e^(s_i / tau) + sum over the queue of e^(<q_i, n_j> / tau)), s_i = <q_i, k_i>",
    gradient="in q alone: keys and queue are fixed",
    source="Momentum Contrast for Unsupervised Visual Representation Learning",
    published="tau 0.07, queue 65536; keys are enqueued after the query",
)
def moco_loss(
    q: Tensor, k: Tensor, queue: Tensor, temperature: Temperature = 0.07, *, queue_valid: Tensor | None = None,
    labels: Tensor | None = None, queue_labels: Tensor | None = None, same_label: str = "positive",
    normalize: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE of queries against their own key and a queue of older keys.

        L_i = log(e^(s_ii / tau) + sum over queue j of e^(<q_i, n_j> / tau)) - s_ii / tau

    Args:
        q, k: [B, D]; k from the momentum encoder, without gradient.
        queue: [N, D] (`Queue.vectors`). queue_valid: bool [N], what of it is filled.
        temperature: tau > 0.
        labels, queue_labels: integers [B], [N]: what to do with queue entries of the row's own label is `same_label`:
            "positive": SupCon-out over own key and queue, the mean of -log p over all positives; "exclude": left out.
        normalize: similarities are cosines (the published model normalises before).
        reduction: "mean", "sum" or "none" ([B]).

    Raises ValueError and TypeError as `pair_stats`. With an empty queue the loss is 0.
    Source: Momentum Contrast for Unsupervised Visual Representation Learning.
    """
    check_reduction(reduction)
    check_pair(q, k)
    scale = scale_of(temperature)
    _check_same_label(same_label)
    if (labels is None) != (queue_labels is None):
        raise ValueError("labels and queue_labels come together")
    same = None if labels is None or queue_labels is None else SameId(labels, queue_labels)
    stats = pair_stats(
        q, queue.detach(), scale=scale, positive=same, column_valid=queue_valid, normalize=normalize, columns=False
    )
    own = scale * own_similarity(q, k.detach(), normalize)
    nll = finite_softplus(stats.neg_lse - own)
    if same is not None and same_label == "positive":
        # lse over all, and the mean of z over the positives of the queue and the own key
        everything = own + finite_softplus(stats.lse - own)
        nll = everything - (stats.pos_sum + own) / (stats.pos_count + 1)
    return reduce(nll, reduction)


class MoCoLoss(nn.Module):
    """`moco_loss` with its queue: computes the loss, then enqueues the keys.

    The loss is computed against a copy of the queue, so that its backward may come later, also after further calls; where that
    memory matters use `Queue` and `moco_loss` and enqueue after the backward.

    Source: Momentum Contrast for Unsupervised Visual Representation Learning (size 65536, tau 0.07).
    """

    def __init__(
        self, dim: int, size: int = 65536, temperature: float = 0.07, *, labels: bool = False,
        same_label: str = "positive", normalize: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        scale_of(temperature)
        _check_same_label(same_label)
        self.temperature, self.same_label, self.normalize = temperature, same_label, normalize
        self.queue = Queue(size, dim, labels=labels, normalize=normalize)

    def forward(self, q: Tensor, k: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss of queries q and keys k [B, D], which are then put into the queue."""
        queue = self.queue
        loss = moco_loss(
            q, k, queue.vectors.to(q.dtype, copy=True), self.temperature, queue_valid=queue.valid, labels=labels,
            queue_labels=None if labels is None or queue.labels is None else queue.labels.clone(),
            same_label=self.same_label, normalize=self.normalize,
        )  # fmt: skip
        queue.enqueue(k, labels)
        return loss
