"""The factored weight of `SphericalLinear` and its exact gradient step, on plain tensors.

W = V U + 1 omegaᵀ [D, d] is never formed. Beside the factors stand what a loss of the spherical family needs of W: its
column sums Wᵀ 1 and the Gram matrix of the centred weight Wc = W - 1 mean(W)ᵀ. Vincent et al. keep WᵀW instead; about
the mean the equations are shorter, since the part of the gradient that is the same for all classes drops out of them, and
the variance of a row's scores is not a difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Elements of V that a pass over all classes takes at a time.
BLOCK = 1 << 22


@dataclass(frozen=True)
class Gradient:
    """What one minibatch says about W: examples, listed classes, and the loss's gradients of the statistics, float64."""

    x: Tensor  # [m, d]
    classes: Tensor  # [m, K] int64
    target_logit: Tensor  # [m, K], 0 where an entry is ignored
    sum: Tensor  # [m]
    centred_sumsq: Tensor  # [m]

    @staticmethod
    def concatenate(parts: list[Gradient]) -> Gradient:
        """The gradient of the summed losses."""
        names = ("x", "classes", "target_logit", "sum", "centred_sumsq")
        return Gradient(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def scaled(self, factor: float) -> Gradient:
        """The gradient of the loss times `factor`."""
        own, total, centred = (t * factor for t in (self.target_logit, self.sum, self.centred_sumsq))
        return Gradient(self.x, self.classes, own, total, centred)

    def finite(self) -> bool:
        """No number is NaN or infinite."""
        numbers = (self.x, self.target_logit, self.sum, self.centred_sumsq)
        return bool(torch.stack([t.isfinite().all() for t in numbers]).all())


class Drift(NamedTuple):
    """How far rounding has taken the state from what it stands for; all but `condition` relative to the largest entry."""

    inverse: float  # max |U U^-1 - I|
    gram: float  # Wcᵀ Wc
    total: float  # Wᵀ 1
    condition: float  # of U: largest over smallest singular value


@dataclass(frozen=True)
class Factors:
    """The tensors of the factored weight; every method that changes them does so in place. All float64 but `v`."""

    v: Tensor  # V [D, d], float32 or float64
    u: Tensor  # U [d, d]
    inverse: Tensor  # U^-1 [d, d]
    omega: Tensor  # [d]
    gram: Tensor  # Wcᵀ Wc [d, d]
    total: Tensor  # Wᵀ 1 [d]

    @property
    def num_classes(self) -> int:
        return self.v.shape[0]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first class, rows of V) of each block of classes."""
        step = max(1, BLOCK // self.v.shape[1])
        for start in range(0, self.num_classes, step):
            yield start, self.v[start : start + step]

    def listed(self, classes: Tensor) -> Tensor:
        """Rows of V in float64: [*classes.shape, d]. Only these are read."""
        rows = F.embedding(classes, self.v)
        return rows.to(self.u.dtype)

    def statistics(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores of the listed classes [m, K], sum of the scores [m], sum of their centred squares [m])."""
        scores = (self.listed(classes) * (x @ self.u.T)[:, None]).sum(-1) + (x @ self.omega)[:, None]
        return scores, x @ self.total, (x * (x @ self.gram)).sum(-1)

    def input_gradients(self, g: Gradient) -> tuple[Tensor, Tensor]:
        """(Wcᵀ y of each example [m, d], Wcᵀ g [m, d]), y the part of the scores' gradient g on the listed classes."""
        listed_sum = g.target_logit.sum(1, keepdim=True)
        own = (g.target_logit[..., None] * self.listed(g.classes)).sum(1) @ self.u
        own += listed_sum * (self.omega - self.total / self.num_classes)
        return own, own + 2 * g.centred_sumsq[:, None] * (g.x @ self.gram)

    def input_gradient(self, g: Gradient) -> Tensor:
        """Wᵀ g [m, d]: the gradient of the loss with respect to x."""
        mean = self.total / self.num_classes
        everywhere = g.target_logit.sum(1) + self.num_classes * g.sum
        return self.input_gradients(g)[1] + everywhere[:, None] * mean

    def step(self, g: Gradient, lr: float, weight_decay: float, worst_condition: float) -> float:
        """W <- (1 - lr weight_decay) W - lr dL/dW, touching only the listed rows of V. The condition of U afterwards.

        dL/dW = (2 c (o - mean(o)) + s + y) xᵀ summed over examples, with c, s the gradients of centred_sumsq and sum.
        Where the new U would be as good as singular (condition above `worst_condition`) the step is done on V U
        instead, at a cost that grows with the number of classes.
        """
        shrink = 1 - lr * weight_decay
        eta = lr / shrink  # the gradient is scaled with the weight below
        x, classes = g.x, self.num_classes
        twice = 2 * g.centred_sumsq[:, None]
        xu, mean, listed_sum = x @ self.u.T, x @ self.total / classes, g.target_logit.sum(1)
        own, centred = self.input_gradients(g)
        touched, per_class = _by_class(g)
        moved = per_class(x)  # yᵀ x [touched, d]

        # with C = 2 xᵀ diag(c) x and P = Wcᵀ Gc, Gc the centred gradient:  Gcᵀ Gc = sym(C (P + ownᵀ x)) + y's own part
        first = centred.T @ x
        listed_x = listed_sum @ x
        second = (twice * x).T @ (x @ ((centred + own).T @ x))
        second += moved.T @ moved - torch.outer(listed_x, listed_x) / classes
        change = first - (eta / 2) * second
        gram = self.gram - eta * (change + change.T)
        total = self.total - eta * (x.T @ (classes * g.sum + listed_sum))
        omega = self.omega - eta * (x.T @ (twice[:, 0] * (x @ self.omega - mean) + g.sum))
        u = self.u - eta * (xu.T @ (twice * x))
        inverse, x_inverse = self._new_inverse(x, eta * twice)

        condition = float(u.norm() * inverse.norm()) / u.shape[0]  # 1 for a multiple of an orthogonal matrix
        self.gram.copy_(gram * shrink**2)
        self.total.copy_(total * shrink)
        if condition <= worst_condition:  # False for NaN
            self.u.copy_(u * shrink)
            self.omega.copy_(omega * shrink)
            self.inverse.copy_(inverse / shrink)
            self._subtract(touched, eta * per_class(x_inverse))
            return condition
        self.merge(u * shrink, omega * shrink)
        self._subtract(touched, lr * moved)
        return 1.0

    def _new_inverse(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of U (I - xᵀ diag(weight) x): its inverse, and x times it. By Woodbury where the batch is smaller than d."""
        if x.shape[0] > x.shape[1]:
            shrunk = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) - x.T @ (weight * x)
            inverse = torch.linalg.solve_ex(shrunk, self.inverse)[0]
            return inverse, x @ inverse
        small = torch.eye(x.shape[0], dtype=x.dtype, device=x.device) - (x @ x.T) * weight.T
        x_inverse = torch.linalg.solve_ex(small, x @ self.inverse)[0]
        return self.inverse + (weight * x).T @ x_inverse, x_inverse

    def _subtract(self, classes: Tensor, change: Tensor) -> None:
        """Rows of V less `change`, rounded once."""
        self.v.index_copy_(0, classes, (self.listed(classes) - change).to(self.v.dtype))

    def merge(self, u: Tensor, omega: Tensor) -> None:
        """V <- V u + 1 omegaᵀ, U <- I, omega <- 0. Costs D d^2."""
        for _, rows in self.blocks():
            rows.copy_(rows.to(u.dtype) @ u + omega)
        for t in (self.u, self.inverse):
            t.copy_(torch.eye(u.shape[0], dtype=u.dtype, device=u.device))
        self.omega.zero_()

    def stabilize(self) -> None:
        """Make the inverse anew, and bring singular values of U that are not within a factor of 2 of the median to it.

        A corrected value moves into V, a cost of D d each; where more than a third are out of range, all of U does.
        """
        left, values, right = torch.linalg.svd(self.u)
        target = values.median()
        out = ~((values >= target / 2) & (values <= 2 * target))
        many = int(out.sum()) > len(values) / 3
        if many or not 1e-8 < float(target) < 1e8:
            return self.merge(self.u.clone(), self.omega.clone())
        if out.any():
            axes, excess = left[:, out], values[out] / target - 1
            for _, rows in self.blocks():  # in float64: TF32 would round all of W
                wide = rows.to(axes.dtype)
                rows.copy_(wide.addmm((wide @ axes) * excess, axes.T))
            values = torch.where(out, target, values)
            self.u.copy_((left * values) @ right)
        self.inverse.copy_((right.T / values) @ left.T)

    def refresh(self) -> None:
        """Make inverse, Gram matrix and column sums anew from V, U and omega. Costs D d^2."""
        inverse, gram, total = self._derived()
        for old, new in ((self.inverse, inverse), (self.gram, gram), (self.total, total)):
            old.copy_(new)

    def _derived(self) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.zeros_like(self.omega)
        for _, rows in self.blocks():
            sums += rows.sum(0, dtype=sums.dtype)
        gram, mean = torch.zeros_like(self.gram), sums / max(1, self.num_classes)
        for _, rows in self.blocks():
            centred = rows.to(mean.dtype) - mean
            gram.addmm_(centred.T, centred)
        gram = self.u.T @ gram @ self.u
        return torch.linalg.inv(self.u), (gram + gram.T) / 2, sums @ self.u + self.num_classes * self.omega

    def drift(self) -> Drift:
        """Compare the state with what follows from V, U and omega. Costs D d^2."""
        _, gram, total = self._derived()
        eye = torch.eye(self.u.shape[0], dtype=self.u.dtype, device=self.u.device)
        return Drift(
            float((self.u @ self.inverse - eye).abs().max()),
            _relative(self.gram, gram),
            _relative(self.total, total),
            float(torch.linalg.cond(self.u)),
        )


def _relative(found: Tensor, expected: Tensor) -> float:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error


class _PerClass:
    """x -> sum over examples of (gradient of a class's score) x, for each class that is listed anywhere."""

    def __init__(self, examples: Tensor, starts: Tensor, weights: Tensor) -> None:
        self.examples, self.starts, self.weights = examples, starts, weights

    def __call__(self, x: Tensor) -> Tensor:
        return F.embedding_bag(self.examples, x, self.starts, mode="sum", per_sample_weights=self.weights)


def _by_class(g: Gradient) -> tuple[Tensor, _PerClass]:
    """(classes listed anywhere, each once; the sums over their examples): sorted, so that the order of sums is fixed."""
    touched, place, counts = torch.unique(g.classes.reshape(-1), return_inverse=True, return_counts=True)
    order = place.argsort(stable=True)
    weights = g.target_logit.reshape(-1)[order]
    return touched, _PerClass(order // g.classes.shape[1], counts.cumsum(0) - counts, weights)
