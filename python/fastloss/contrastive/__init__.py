"""Contrastive and metric-learning losses, as functions of embeddings and as modules; no similarity matrix is stored."""

from .clip import ClipLoss, clip_loss

__all__ = [
    "ClipLoss",
    "clip_loss",
]
