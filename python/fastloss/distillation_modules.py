"""Distillation recipes of several parts: two heads on one feature, classes and aspects in one head, boundary and body."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional, losses
from .row_loss import linear_row_loss, row_loss
from .terms import TeacherHead


class DualHeadDistillationLoss(torch.nn.Module):
    """DHKD: cross entropy on the main head, the log-cosh distance to the teacher on an auxiliary head, one feature.

    L = CE(W h, y) + alpha T^2 sum_j log cosh((a_j - t_j) / (2 T)), a = W_aux h; neither head's logits are stored. Use
    `main` to predict. alpha 1 (CIFAR-100) or 0.1 (ImageNet), T = 2.

    "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head".
    """

    def __init__(
        self, in_features: int, num_classes: int, *, alpha: float = 1.0, temperature: float = 2.0, bias: bool = True,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.alpha, self.temperature = alpha, temperature
        self.main = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.auxiliary = torch.nn.Linear(in_features, num_classes, bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor, teacher: Tensor | TeacherHead) -> Tensor:
        """The loss of features [N, D], class ids [N] and the teacher's logits [N, V] or its head."""
        hard = functional.linear_cross_entropy(input, self.main.weight, target, linear_bias=self.main.bias)
        soft = linear_row_loss(
            input, self.auxiliary.weight, None, losses.log_cosh, linear_bias=self.auxiliary.bias, teacher=teacher,
            temperature=self.temperature,
        )  # fmt: skip
        return hard + self.alpha * soft


def multi_aspect_distillation(
    input: Tensor, linear_weight: Tensor, target: Tensor, aspects: Tensor, *, alpha: float = 1.0,
    linear_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy on the first classes of a head [C + A, D], alpha times binary cross entropy on its last A columns.

    aspects [N, A]: a large model's probability of "yes" to each question about the example; the binary part is the mean
    over examples of the sum over aspects. "Multi-aspect Knowledge Distillation with Large Language Model".
    """
    classes = linear_weight.shape[0] - aspects.shape[-1]
    if classes < 1:
        raise ValueError(
            f"a head of {linear_weight.shape[0]} columns has no room for {aspects.shape[-1]} aspects and a class"
        )
    bias = (None, None) if linear_bias is None else (linear_bias[:classes], linear_bias[classes:])
    hard = functional.linear_cross_entropy(input, linear_weight[:classes], target, linear_bias=bias[0])
    soft = linear_row_loss(
        input, linear_weight[classes:], None, losses.binary_distillation, linear_bias=bias[1], teacher=aspects,
        teacher_logits=False,
    )  # fmt: skip
    return hard + alpha * soft


def boundary_distillation(
    logits: Tensor, teacher: Tensor, boundary: Tensor, *, edge: float = 1.0, body: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """BPKD of maps [B, C, H, W]: KL over the classes on boundary pixels, KL over the pixels of each channel on the rest.

    boundary [B, H, W] bool, e.g. a dilated border of the labels. Means over the boundary's pixels and over the channels;
    a part that is empty counts 0. "BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation".
    """
    if logits.dim() != 4 or logits.shape != teacher.shape or boundary.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"takes logits and teacher [B, C, H, W] and boundary [B, H, W], got {tuple(logits.shape)}, "
            f"{tuple(teacher.shape)} and {tuple(boundary.shape)}"
        )
    with_temperature: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    student_pixels, teacher_pixels = (x.permute(0, 2, 3, 1).contiguous() for x in (logits, teacher))
    pixels = row_loss(student_pixels, None, losses.forward_kl, teacher=teacher_pixels, **with_temperature)
    on_edge = torch.where(boundary, pixels, 0.0).sum() / boundary.sum().clamp(min=1)
    inside = ~boundary[:, None]
    far = torch.finfo(logits.dtype).min / 4  # outside of the body: no mass, and no gradient
    student_maps, teacher_maps = (torch.where(inside, x, far).flatten(2) for x in (logits, teacher))
    maps = row_loss(student_maps, None, losses.forward_kl, teacher=teacher_maps, **with_temperature)
    some = inside.flatten(2).any(-1).expand(maps.shape)
    in_body = torch.where(some, maps, 0.0).sum() / some.sum().clamp(min=1)
    return edge * on_edge + body * in_body
