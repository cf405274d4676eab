"""open_clip's `ClipLoss` and `SigLipLoss` without the matrix of logits.

open_clip normalises in the model: features are taken as they are. On several ranks every mode of the losses costs b x B
similarities a rank, b rows of the rank's own against the B = b W of all, and O(B D) memory. Features of one process:

    loss = ClipLoss()(image_features, text_features, logit_scale)
"""

from __future__ import annotations

from torch import Tensor, nn

from ..contrastive.distributed import check_place, gather_keys, mean_gradient, mean_over_ranks, scale_gradient
from ..pairs import Diagonal, pair_map, pair_nll, pair_stats

Loss = Tensor | dict[str, Tensor]
_EXCHANGES = ("bidir", "shift", "reduce", "gather")


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must have one shape [B, D], "
            f"got {list(image_features.shape)} and {list(text_features.shape)}"
        )


class ClipLoss(nn.Module):
    """The mean of the cross entropies of scale <image_i, text_j> over rows and over columns.

    Args:
        local_loss: each rank's loss is the mean over its own rows; otherwise every rank returns the mean over all
            ranks' rows.
        gather_with_grad: the features gathered from the ranks have gradients, which are summed over the ranks.
        cache_labels: accepted; there are no labels to keep.
        rank, world_size: this process's place in the default process group.
        use_horovod: refused with ValueError.

    On W ranks, as in open_clip, with the gradients in units of that of the mean over all B rows of one process:

    | local_loss | gather_with_grad | value | gradient of the features |
    |---|---|---|---|
    | no | no | mean over B rows | 1; 1 / W after DistributedDataParallel's mean over ranks (open_clip issue 616) |
    | no | yes | mean over B rows | W; 1 after that mean |
    | yes | yes | mean over own rows | W; 1 after that mean |
    | yes | no | mean over own rows | that of the feature as a row; none as a key of other rows |

    open_clip computes the whole B x B matrix on every rank where local_loss is off; here a rank computes its own rows,
    and averages the value and the gradient of logit_scale over the ranks: the same numbers.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True is not supported: torch.distributed is (use_horovod=False)")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Loss:  # fmt: skip
        """The loss of features [b, D]; {"contrastive_loss": loss} with `output_dict`.

        logit_scale: > 0. logit_bias shifts all logits alike, which no softmax sees: its gradient is 0.
        """
        _check_features(image_features, text_features)
        if self.world_size > 1:
            loss = self._over_ranks(image_features, text_features, logit_scale)
        else:
            rows, columns = pair_nll(image_features, text_features, scale=logit_scale, columns=True)
            loss = (rows.mean() + columns.mean()) / 2
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # a parameter outside the graph would stop DistributedDataParallel
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        check_place(self.rank, self.world_size)
        if not self.local_loss:
            # A key's gradient is summed over the ranks: W times that of the mean over all rows.
            factor = 1.0 if self.gather_with_grad else 1 / self.world_size
            image, text = scale_gradient(image, factor), scale_gradient(text, factor)
            scale = mean_gradient(scale) if isinstance(scale, Tensor) else scale
        gradient = self.gather_with_grad or not self.local_loss
        own = Diagonal(self.rank * len(image))
        losses = [
            pair_stats(rows, gather_keys(keys, gradient=gradient), scale=scale, positive=own, columns=False).nll.mean()
            for rows, keys in ((image, text), (text, image))
        ]
        loss = (losses[0] + losses[1]) / 2
        return loss if self.local_loss else mean_over_ranks(loss)


class SigLipLoss(nn.Module):
    """-sum over all i, j of log sigmoid(+-(scale <image_i, text_j> + bias)), + where i = j, divided by the number of
    *rows*.

    Args:
        cache_labels: accepted; there are no labels to keep.
        rank, world_size: this process's place in the default process group.
        dist_impl: "bidir" (default), "shift", "reduce" or "gather": four ways to bring the other ranks' texts, one
            number. Here all of them gather; the gradient of a text is summed over the ranks that saw it.

    The loss of a rank is that of its own rows against the texts of all ranks, divided by its own rows.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl is not None and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_EXCHANGES)} or None, got {dist_impl!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, output_dict: bool = False,
    ) -> Loss:  # fmt: skip
        """The loss of features [b, D]; {"contrastive_loss": loss} with `output_dict`. logit_scale: > 0."""
        _check_features(image_features, text_features)
        if self.world_size > 1:
            check_place(self.rank, self.world_size)
            text_features = gather_keys(text_features)
        threshold = None if logit_bias is None else -logit_bias
        if isinstance(threshold, Tensor):
            threshold = threshold.reshape(())
        sums = pair_map(
            image_features, text_features, "softplus", scale=logit_scale, neg_threshold=threshold,
            pos_threshold=threshold, positive=Diagonal(self.rank * len(image_features)),
        )  # fmt: skip
        loss = (sums.neg + sums.pos).mean()
        return {"contrastive_loss": loss} if output_dict else loss
