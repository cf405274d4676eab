"""ELECTRA: corrupt a text with a generator's samples, and detect which tokens were replaced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import entry

_SOURCE = (
    'Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators" (2020), equations 1-2'
)


def electra_replace(input_ids: Tensor, masked: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """(corrupted ids, is_replaced): the text with the generator's samples at the masked positions.

    input_ids: the original ids, before masking, any shape and integer dtype. masked: bool of that shape. sampled: the
    generator's tokens (`fastloss.linear_sample(...).index`), of the shape of input_ids, or one for every True of `masked`
    in order. is_replaced is float32, 1 where the new id differs from the original: a sample that happens to be the original
    token counts as real (Clark et al. 2020, section 2). Without a host sync if `sampled` has the full shape.

    Raises ValueError and TypeError for shapes, dtypes and devices that do not fit.
    """
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integers, got {input_ids.dtype}")
    if masked.dtype != torch.bool or masked.shape != input_ids.shape:
        raise ValueError(
            f"masked must be torch.bool {tuple(input_ids.shape)}, got {masked.dtype} {tuple(masked.shape)}"
        )
    if sampled.is_floating_point() or sampled.is_complex() or sampled.dtype == torch.bool:
        raise TypeError(f"sampled must hold integers, got {sampled.dtype}")
    if len({t.device for t in (input_ids, masked, sampled)}) > 1:
        raise ValueError(f"one device for all, got {input_ids.device}, {masked.device} and {sampled.device}")
    new = sampled.to(input_ids.dtype)
    if sampled.shape == input_ids.shape:
        corrupted = torch.where(masked, new, input_ids)
    elif sampled.shape == (count := (int(masked.sum()),)):
        corrupted = input_ids.clone()
        corrupted[masked] = new
    else:
        raise ValueError(
            f"sampled must have shape {tuple(input_ids.shape)}, or {count}: one a masked position; "
            f"got {tuple(sampled.shape)}"
        )
    return corrupted, (corrupted != input_ids).float()


@entry(
    formula="weight * mean over real tokens of -[y log sigmoid(s) + (1 - y) log(1 - sigmoid(s))]",
    gradient="ds = weight (sigmoid(s) - y) / number of real tokens",
    source=_SOURCE,
    published="minimised as MLM cross entropy of the generator + 50 times this; the sum there is over all positions, "
    "the published code averages over those that are no padding, as here.",
)
def replaced_token_detection(
    logits: Tensor, is_replaced: Tensor, mask: Tensor | None = None, *, weight: float = 50.0
) -> Tensor:
    """weight times the mean, over real tokens, of the binary cross entropy between sigmoid(logits) and is_replaced.

    ELECTRA's discriminator loss with its published weight lambda = 50: the whole loss is the generator's masked cross
    entropy plus this. logits: [...], one score a token, float. is_replaced: [...], 0 or 1, as `electra_replace` makes it.
    mask: bool [...], True on real tokens, which excludes padding; without it all count. With no real token it is 0.

    Returns one number in float32 (float64 for float64 logits), differentiable in the logits. Raises ValueError and
    TypeError for shapes and dtypes that do not fit. Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators
    Rather Than Generators" (2020).
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if is_replaced.shape != logits.shape:
        raise ValueError(f"is_replaced must have shape {tuple(logits.shape)}, got {tuple(is_replaced.shape)}")
    if mask is not None and (mask.shape != logits.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be torch.bool {tuple(logits.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    score = logits if logits.dtype == torch.float64 else logits.float()
    target = is_replaced.to(score.dtype)
    if mask is None:
        return weight * F.binary_cross_entropy_with_logits(score, target, reduction="sum") / max(1, score.numel())
    # Padding may hold anything, also what has no finite loss.
    rows = F.binary_cross_entropy_with_logits(
        score.masked_fill(~mask, 0), target.masked_fill(~mask, 0), reduction="none"
    )
    return weight * torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)
