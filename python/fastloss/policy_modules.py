"""Modules of the preference and policy losses: a function and its keyword arguments, on log-probabilities or on a head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import losses
from .losses.aggregation import token_entropy_bonus
from .segments import Sequences, sequences
from .token_logp import token_logp, token_mask


class PolicyLoss(torch.nn.Module):
    """Any loss of `fastloss.losses` (or the user's) on log-probabilities of tokens, with its keyword arguments.

    >>> criterion = fastloss.nn.PolicyLoss(fastloss.losses.grpo, clip_high=0.28)  # doctest: +SKIP
    >>> criterion = fastloss.nn.GRPOLoss(clip_high=0.28)  # the same  # doctest: +SKIP
    >>> criterion(logp, old_logp, advantage, mask=mask).backward()  # doctest: +SKIP

    Raises TypeError for an argument that the loss does not take.
    """

    named_loss: ClassVar[Callable[..., Tensor] | None] = None

    def __init__(self, loss: Callable[..., Tensor] | None = None, **arguments: Any) -> None:
        super().__init__()
        chosen = loss if loss is not None else type(self).named_loss
        if chosen is None:
            raise TypeError(f"{type(self).__name__} needs a loss: a function of log-probabilities")
        if loss is not None and type(self).named_loss is not None:
            raise TypeError(f"{type(self).__name__} has its loss; PolicyLoss takes one, got {loss!r}")
        self.loss = chosen
        self._check(arguments)
        self.arguments = arguments

    def _check(self, arguments: dict[str, Any]) -> None:
        accepted = inspect.signature(self.loss).parameters
        if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            return
        for name in arguments:
            if name not in accepted:
                raise TypeError(
                    f"{getattr(self.loss, '__name__', self.loss)} takes no {name!r}: one of {', '.join(accepted)}"
                )

    def forward(self, logp: Tensor, *given: Any, **arguments: Any) -> Tensor:
        """The loss of log-probabilities [B, T]; what else it takes (old_logp, advantage, mask) as the loss names it."""
        return self.loss(logp, *given, **{**self.arguments, **arguments})

    def extra_repr(self) -> str:
        """The loss, where the class does not say it, and its arguments."""
        name = [] if type(self).named_loss else [getattr(self.loss, "__name__", str(self.loss))]
        return ", ".join(name + [f"{key}={value!r}" for key, value in self.arguments.items()])


class PreferenceLoss(PolicyLoss):
    """A loss of pairs on log-probabilities of tokens: `fastloss.losses.preference(loss, ...)`.

    >>> fastloss.nn.DPOLoss(beta=0.05)(logp, reference_logp, mask=mask)  # chosen answers first  # doctest: +SKIP
    """

    def _check(self, arguments: dict[str, Any]) -> None:
        wrapper = ("average", "reduction", "mask")
        super()._check({name: value for name, value in arguments.items() if name not in wrapper})

    def forward(self, logp: Tensor, *given: Any, **arguments: Any) -> Tensor:
        """The loss of [2 P, T], the chosen answers in the first half; then reference_logp where the loss has one."""
        return losses.preference(self.loss, logp, *given, **{**self.arguments, **arguments})


class KTOLoss(PolicyLoss):
    """`fastloss.losses.kto` on log-probabilities of tokens, averaged over the answers."""

    named_loss = staticmethod(losses.kto)

    def forward(  # type: ignore[override]
        self, logp: Tensor, reference_logp: Tensor, desirable: Tensor, reference_point: float | Tensor,
        *, mask: Tensor | Sequences | None = None, **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Log-probabilities of tokens [B, T]; which answers are desirable [B]; the reference point of `kto`."""
        answers = (losses.sequence_logp(tokens, mask) for tokens in (logp, reference_logp))
        each = self.loss(*answers, desirable, reference_point, **{**self.arguments, **arguments})
        return each.sum() / max(1, each.numel())


class LinearPolicyLoss(torch.nn.Module):
    """A criterion on log-probabilities of tokens, on a linear head whose logits are never stored.

    >>> criterion = fastloss.nn.LinearPolicyLoss(fastloss.nn.GRPOLoss(), temperature=0.8)  # doctest: +SKIP
    >>> criterion(hidden, head.weight, tokens, old_logp, advantage, shift=True)  # doctest: +SKIP

    criterion: one of the modules here, or any function of (logp, ..., mask=...). The other arguments are those of
    `fastloss.token_logp`: temperature, logit_scale, softcap, ignore_index, shift, max_extra_bytes. entropy_weight: what
    `fastloss.losses.token_entropy_bonus` weighs the entropy with; 0 computes none.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        shift: bool = False,
        entropy_weight: float = 0.0,
        max_extra_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.target: dict[str, Any] = {"ignore_index": ignore_index, "shift": shift}
        self.head: dict[str, Any] = {
            "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "max_extra_bytes": max_extra_bytes,
        }  # fmt: skip
        self.entropy_weight = entropy_weight

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *given: Any,
        linear_bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        mask: Tensor | Sequences | None = None,
        **arguments: Any,
    ) -> Tensor:
        """criterion(token_logp(input, linear_weight, target), *given, mask=..., **arguments).

        Tokens without a target (ignore_index, or the last position under shift) do not count, whatever the mask says;
        the mask is that of the log-probabilities: with shift its position t is about token t + 1.
        """
        entropy = self.entropy_weight != 0.0
        out = token_logp(
            input, linear_weight, target, linear_bias=linear_bias, sequence_ids=sequence_ids, entropy=entropy,
            **self.target, **self.head,
        )  # fmt: skip
        logp, spread = out if entropy else (out, None)
        known = token_mask(target, sequence_ids=sequence_ids, **self.target)
        counted = sequences(mask, logp).only(known)
        loss = self.criterion(logp, *given, mask=counted, **arguments)
        return loss if spread is None else loss + token_entropy_bonus(spread, self.entropy_weight, mask=counted)

    def extra_repr(self) -> str:
        """The head's settings that are not the usual ones."""
        given = {**self.target, **self.head, "entropy_weight": self.entropy_weight}
        usual = {p.name: p.default for p in inspect.signature(type(self)).parameters.values()}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != usual[name])


def _named(base: type[PolicyLoss], name: str, loss: Callable[..., Tensor]) -> Any:
    """A subclass that has its loss."""
    doc = f"`fastloss.losses.{loss.__name__}` as a module; its keyword arguments are those of the function."
    return type(name, (base,), {"named_loss": staticmethod(loss), "__doc__": doc, "__module__": __name__})


DPOLoss = _named(PreferenceLoss, "DPOLoss", losses.dpo)
IPOLoss = _named(PreferenceLoss, "IPOLoss", losses.ipo)
ORPOLoss = _named(PreferenceLoss, "ORPOLoss", losses.orpo)
RPOLoss = _named(PreferenceLoss, "RPOLoss", losses.rpo)
SimPOLoss = _named(PreferenceLoss, "SimPOLoss", losses.simpo)
AsymRELoss = _named(PolicyLoss, "AsymRELoss", losses.asymre)
CISPOLoss = _named(PolicyLoss, "CISPOLoss", losses.cispo)
GRPOLoss = _named(PolicyLoss, "GRPOLoss", losses.grpo)
GSPOLoss = _named(PolicyLoss, "GSPOLoss", losses.gspo)
OPMDLoss = _named(PolicyLoss, "OPMDLoss", losses.opmd)
PolicyGradientLoss = _named(PolicyLoss, "PolicyGradientLoss", losses.policy_gradient)
PPOLoss = _named(PolicyLoss, "PPOLoss", losses.ppo_clip)
RECLoss = _named(PolicyLoss, "RECLoss", losses.rec)
SAPOLoss = _named(PolicyLoss, "SAPOLoss", losses.sapo)
TOPRLoss = _named(PolicyLoss, "TOPRLoss", losses.topr)
