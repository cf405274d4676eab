"""The discrete key-value bottleneck: features choose keys, and only the values of those are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nearest_key import nearest_key
from .chosen_rows import chosen_rows, rows_sum


def kmeans(x: Tensor, count: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """`count` means [count, D] of the rows of x [M, D] by Lloyd's iterations from rows drawn without replacement (with,
    where there are fewer).

    A mean that no row is nearest to stays where it is. Raises ValueError without rows.
    """
    if x.dim() != 2 or not x.shape[0]:
        raise ValueError(f"x must be [M, D] with at least one row, got {list(x.shape)}")
    means = x.detach()[_drawn(x.shape[0], count, x.device, generator)]
    for _ in range(iterations):
        index = nearest_key(x, means)
        size = torch.bincount(index, minlength=count)[:, None]
        sums = rows_sum(x.detach(), index, count)
        means = torch.where(size > 0, sums / size.clamp(min=1), means).to(x.dtype)
    return means


def _drawn(rows: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """`count` of `rows` indices, different as far as there are enough."""
    where = generator.device if generator is not None else torch.device("cpu")
    order = torch.randperm(rows, generator=generator, device=where)
    if count > rows:
        more = torch.randint(rows, (count - rows,), generator=generator, device=where)
        order = torch.cat((order, more))
    return order[:count].to(device)


class KeyValueBottleneck(nn.Module):
    """Each of C heads of a feature chooses its nearest key, and the value of that key comes out.

        index_c = argmin_j |x_c - k_cj|^2,   y_c = v_(c, index_c)
        keys, for n_j rows of a batch nearest to key j, with sum s_j:
        N_j <- decay N_j + (1 - decay) n_j,   S_j <- decay S_j + (1 - decay) s_j
        k_j = S_j / ((N_j + eps) / (sum N + keys eps) sum N)                               (Laplace smoothing)
        a key with N_j < dead below is set to a row of the batch, drawn at random, with N_j = max(1, dead)

    The gradient goes to the chosen values only: what other inputs chose is not forgotten. The paper's order: start the
    keys from features (`start_keys` by k-means, `update_keys` over the unlabelled data), then leave them, and train the
    values.

    Args:
        codebooks: C. keys: how many a codebook. key_features, value_features: their dimensions.
        decay: of the running sums; eps: of the smoothing; dead_below: 0 never sets a key anew.
        generator: for the random draws.

    Buffers: keys [C, N, D], sizes [C, N], sums [C, N, D]. Parameter: values [C, N, V], standard normal.
    The released code's random choice (Gumbel noise on the distances) is left out: it needs the matrix of distances. So
    is the random projection of features to heads: give the heads.
    Source: "Discrete Key-Value Bottleneck".
    """

    keys: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(
        self, codebooks: int, keys: int, key_features: int, value_features: int, *, decay: float = 0.95, eps: float = 1e-5,
        dead_below: float = 0.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        given = {"codebooks": codebooks, "keys": keys, "key_features": key_features, "value_features": value_features}
        for name, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not eps > 0 or not dead_below >= 0:
            raise ValueError(f"eps must be > 0 and dead_below >= 0, got {eps} and {dead_below}")
        self.decay, self.eps, self.dead_below, self.generator = decay, eps, dead_below, generator
        start = torch.randn(codebooks, keys, key_features, generator=generator)
        self.register_buffer("keys", start)
        self.register_buffer("sizes", torch.ones(codebooks, keys))
        self.register_buffer("sums", start.clone())
        self.values = nn.Parameter(torch.randn(codebooks, keys, value_features, generator=generator))

    def _heads(self, x: Tensor) -> Tensor:
        """[..., C, D] -> [C, M, D] in the dtype of the keys."""
        if x.dim() < 2 or x.shape[-2:] != (self.keys.shape[0], self.keys.shape[2]):
            raise ValueError(f"x must be [..., {self.keys.shape[0]}, {self.keys.shape[2]}], got {list(x.shape)}")
        return x.detach().reshape(-1, *x.shape[-2:]).transpose(0, 1).to(self.keys.dtype)

    def nearest(self, x: Tensor) -> Tensor:
        """The index of the key that each head of x [..., C, D] chooses, int64 [..., C]. ValueError where x is not
        finite."""
        index = nearest_key(self._heads(x), self.keys)
        if bool((index < 0).any()):
            raise ValueError("x or all keys of a codebook hold a NaN or an infinity: no key is nearest")
        return index.T.reshape(x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, D] -> [..., C, V]."""
        index, (codebooks, keys, features) = self.nearest(x), self.values.shape
        first = keys * torch.arange(codebooks, device=index.device)
        return chosen_rows(self.values.flatten(0, 1), (index + first).reshape(-1)).reshape(*index.shape, features)

    @torch.no_grad()
    def start_keys(self, x: Tensor, iterations: int = 10) -> None:
        """Set the keys to k-means of x [..., C, D]."""
        heads = self._heads(x)
        means = [kmeans(head, self.keys.shape[1], iterations, self.generator) for head in heads]
        self.keys.copy_(torch.stack(means))
        self.sizes.fill_(1.0)
        self.sums.copy_(self.keys)

    @torch.no_grad()
    def update_keys(self, x: Tensor) -> Tensor:
        """Move the keys towards x [..., C, D], once; returns what was nearest before, int64 [..., C]."""
        index, heads = self.nearest(x), self._heads(x)
        chosen = index.reshape(-1, index.shape[-1])
        for c, head in enumerate(heads):
            count = torch.bincount(chosen[:, c], minlength=self.keys.shape[1]).to(self.sizes.dtype)
            self.sizes[c].lerp_(count, 1 - self.decay)
            self.sums[c].lerp_(rows_sum(head, chosen[:, c], self.keys.shape[1]), 1 - self.decay)
            self._renew_dead(c, head)
        total = self.sizes.sum(1, keepdim=True)
        smoothed = (self.sizes + self.eps) / (total + self.keys.shape[1] * self.eps) * total
        self.keys.copy_(self.sums / smoothed[..., None])
        return index

    def _renew_dead(self, c: int, head: Tensor) -> None:
        dead = (self.sizes[c] < self.dead_below).nonzero()[:, 0]
        if dead.numel() and head.shape[0]:
            size = max(1.0, self.dead_below)
            self.sums[c, dead] = size * head[_drawn(head.shape[0], dead.numel(), head.device, self.generator)]
            self.sizes[c, dead] = size

    def extra_repr(self) -> str:
        codebooks, keys, features = self.keys.shape
        return f"{codebooks}, {keys}, {features}, {self.values.shape[2]}, decay={self.decay}"
