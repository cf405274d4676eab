"""Low-rank representation mimicking: a binary student's features follow a full-precision teacher's in few directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import wide


class LowRankMimicking(nn.Module):
    """weight mean_i mean((s_i K_i - t_i K_i)²), K_i [c, q] the first principal directions of the teacher's features t_i.

    K_i come from the teacher's first batch (torch.pca_lowrank, niter 2) and stay: the loss is of a student that is far
    away, and a few directions are easier to follow than all.

    Args:
        features: c of each pair of features.
        rank: q; None: c // 4, at least 2.
        weight: 1e-4 in the paper.

    "BinaryDM: Towards Accurate Binarization of Diffusion Model". Raises ValueError.
    """

    initialized: Tensor

    def __init__(
        self,
        features: Sequence[int],
        rank: int | None = None,
        weight: float = 1e-4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not features or any(c < 2 for c in features) or (rank is not None and not 1 <= rank <= min(features)):
            raise ValueError(
                f"features must be at least 2 each, rank at most the least of them, got {features} and {rank}"
            )
        self.features, self.weight = tuple(features), weight
        for i, c in enumerate(self.features):
            q = max(2, c // 4) if rank is None else rank
            self.register_buffer(f"directions_{i}", torch.zeros(c, q, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._ready = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_ready", bool(module.initialized)))

    def directions(self, index: int) -> Tensor:
        """K of one pair of features, [c, q]."""
        return self.get_buffer(f"directions_{index}")

    @torch.no_grad()
    def initialize(self, teacher: Sequence[Tensor]) -> None:
        """Set the directions from the teacher's features, as the first forward does."""
        for i, t in enumerate(teacher):
            flat, found = t.flatten(0, -2).to(wide(t)), self.directions(i)
            if min(flat.shape) < found.shape[1]:
                raise ValueError(
                    f"{found.shape[1]} directions need as many rows of features at least, got {list(flat.shape)}"
                )
            found.copy_(torch.pca_lowrank(flat, q=found.shape[1], niter=2)[2])
        self.initialized.fill_(True)
        self._ready = True

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of lists of features [..., c]; the teacher's get no gradient."""
        for name, given in (("student", student), ("teacher", teacher)):
            if len(given) != len(self.features) or any(
                t.shape[-1] != c for t, c in zip(given, self.features, strict=True)
            ):
                raise ValueError(f"{name} must be features of {self.features}, got {[list(t.shape) for t in given]}")
        if not self._ready:
            self.initialize(teacher)
        total = student[0].new_zeros(())
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.shape != t.shape:
                raise ValueError(f"features must have one shape, got {list(s.shape)} and {list(t.shape)}")
            k = self.directions(i).to(s.dtype)
            total = total + nn.functional.mse_loss(s @ k, t.detach().to(s.dtype) @ k)
        return self.weight / len(self.features) * total

    def extra_repr(self) -> str:
        return f"{self.features}, weight={self.weight}"
