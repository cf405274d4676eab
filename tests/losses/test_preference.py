"""Preference losses: each against its definition, answer by answer, and through the head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import Sequences, losses, nn
from token_problem import LENGTHS, MASK, B, T, old_and_reference, pack, policies, through_head

P = B // 2
MEANS = ("ipo", "orpo", "simpo")
REFERENCE_FREE = ("orpo", "simpo")


def answers(logp: Tensor, mask: Tensor, mean: bool) -> list[Tensor]:
    out = []
    for b in range(B):
        tokens = [logp[b, t] for t in range(T) if mask[b, t]]
        out.append(sum(tokens[1:], tokens[0]) / (len(tokens) if mean else 1))
    return out


def sigmoid(u: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-u))


def expected(name: str, o: dict[str, Any], logp: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """The mean over pairs, from probabilities where the definition has probabilities."""
    logps, r = answers(logp, mask, name in MEANS), answers(ref.to(logp.dtype), mask, name in MEANS)
    if o.get("reference_free"):
        r = [torch.zeros_like(t) for t in r]
    total = torch.zeros((), dtype=logp.dtype)
    for w, lose in ((i, i + P) for i in range(P)):
        h = (logps[w] - r[w]) - (logps[lose] - r[lose])
        beta, smoothing = o.get("beta", {"simpo": 2.0, "rpo": 0.01}.get(name, 0.1)), o.get("label_smoothing", 0.0)
        if name == "ipo":
            total = total + (h - 1 / (2 * beta)).square()
        elif name == "orpo":
            odds = [torch.exp(t) / (1 - torch.exp(t)) for t in (logps[w], logps[lose])]
            total = total - logps[w] - o.get("weight", 0.1) * torch.log(odds[0] / (odds[0] + odds[1]))
        else:
            u = beta * (logps[w] - logps[lose]) - o.get("gamma", 0.5) if name == "simpo" else beta * h
            total = total - (1 - smoothing) * torch.log(sigmoid(u)) - smoothing * torch.log(sigmoid(-u))
        if name == "rpo" and "nll_weight" in o:
            total = total - o["nll_weight"] * logps[w] / LENGTHS[w]
        elif name == "rpo":
            total = total - o.get("eta", 0.005) * beta * logps[w]
    return total / P


CASES = [
    ("dpo", {}), ("dpo", {"beta": 1.5, "label_smoothing": 0.2}), ("dpo", {"reference_free": True}), ("ipo", {}),
    ("ipo", {"beta": 0.7}), ("orpo", {}), ("orpo", {"weight": 2.0}), ("simpo", {}),
    ("simpo", {"beta": 2.5, "gamma": 1.2, "label_smoothing": 0.1}), ("rpo", {}), ("rpo", {"beta": 0.5, "eta": 0.3}),
    ("rpo", {"beta": 0.5, "nll_weight": 0.2}),
]  # fmt: skip
IDS = ["-".join([name, *map(str, o.values())]) for name, o in CASES]


def call(name: str, logp: Tensor, ref: Tensor, mask: Any, **o: Any) -> Tensor:
    given = () if name in REFERENCE_FREE or o.get("reference_free") else (ref,)
    return losses.preference(getattr(losses, name), logp, *given, mask=mask, **o)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "o"), CASES, ids=IDS)
def test_loss_is_its_definition(name: str, o: dict[str, Any], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    _, ref = old_and_reference(dtype)
    torch.set_rng_state(state)
    through_head(
        lambda logp, mask: call(name, logp, ref, mask, **o),
        lambda logp, mask: expected(name, o, logp, ref, mask),
        dtype,
    )


def kto_expected(logp: Tensor, ref: Tensor, mask: Tensor, point: float, beta: float, good: float, bad: float) -> Tensor:
    logps, r = answers(logp, mask, False), answers(ref.to(logp.dtype), mask, False)
    total = torch.zeros((), dtype=logp.dtype)
    for b in range(B):
        gain = beta * (logps[b] - r[b] - point)
        total = total + (good * (1 - sigmoid(gain)) if b % 2 == 0 else bad * (1 - sigmoid(-gain)))
    return total / B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kto(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    other, ref = old_and_reference(dtype)
    torch.set_rng_state(state)
    desirable = torch.arange(B) % 2 == 0
    of_answers = [losses.sequence_logp(t, MASK) for t in (other + 0.5, ref)]
    leaf = of_answers[0].requires_grad_()
    point = losses.kto_reference_point(leaf, of_answers[1])
    assert not point.requires_grad and point > 0
    kl = math.fsum((other + 0.5 - ref)[MASK].tolist()) / B
    assert float(point) == pytest.approx(kl, rel=1e-5)
    assert losses.kto_reference_point(of_answers[1] - 1, of_answers[1]) == 0
    through_head(
        lambda logp, mask: nn.KTOLoss(beta=0.3, undesirable_weight=1.7)(logp, ref, desirable, point, mask=mask),
        lambda logp, mask: kto_expected(logp, ref, mask, float(point), 0.3, 1.0, 1.7),
        dtype,
    )


@pytest.mark.parametrize(("name", "o"), CASES, ids=IDS)
def test_masked_tokens_add_exactly_nothing(name: str, o: dict[str, Any]) -> None:
    logp, _, ref = policies()
    clean = call(name, logp, ref, MASK, **o)
    bad = torch.tensor([torch.nan, -torch.inf])[torch.arange(B * T).reshape(B, T) % 2]
    leaf = torch.where(MASK, logp, bad).requires_grad_()
    value = call(name, leaf, torch.where(MASK, ref, bad), MASK.float(), **o)
    (grad,) = torch.autograd.grad(value, leaf)
    assert torch.equal(value, clean)
    assert (grad[~MASK] == 0).all() and grad.isfinite().all() and (grad[MASK] != 0).all()
    none = call(name, leaf, ref, torch.zeros_like(MASK), **o)
    (grad,) = torch.autograd.grad(none, leaf)
    assert none.isfinite() and (grad == 0).all()


@pytest.mark.parametrize(("name", "o"), CASES, ids=IDS)
def test_packed_is_padded(name: str, o: dict[str, Any]) -> None:
    logp, _, ref = (t.requires_grad_() for t in policies(torch.float64))
    (flat, flat_ref), ids = pack(logp, ref)
    padded, packed = call(name, logp, ref, MASK, **o), call(name, flat, flat_ref, Sequences.packed(ids, B), **o)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad(t, (logp, ref), allow_unused=True) for t in (packed, padded))
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    assert got[1] is None and want[1] is None, "the reference is a constant"


@pytest.mark.parametrize("chosen", [0.0, -1e-30, -1e-9, -1.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-30, -1e-9, -1.0, -1e4])
def test_extreme_answers(chosen: float, rejected: float) -> None:
    """Finite, and never of the wrong sign, from probability 1 to e^-10000, in float32."""
    for name, o in CASES:
        logps = [torch.tensor([t], requires_grad=True) for t in (chosen, rejected)]
        loss = getattr(losses, name)
        given = () if name in REFERENCE_FREE else (torch.tensor([rejected]), torch.tensor([chosen]))
        o = o | ({"chosen_tokens": torch.ones(1)} if "nll_weight" in o else {})
        value = loss(*logps, *given, **o)
        grad = torch.autograd.grad(value.sum(), logps)
        assert value.isfinite().all() and all(g.isfinite().all() for g in grad), name
        if name == "orpo":
            assert grad[0] <= -1 and grad[1] >= 0


@pytest.mark.parametrize("chosen", [0.0, -1e-30, -1e-9, -1e-3, -1.0, -50.0])
def test_orpo_keeps_its_gradient_at_probability_one(chosen: float) -> None:
    """d/dl of log(1 + odds_l (e^-l - 1)) goes to -odds_l, where 1 - e^l cancels to nothing."""
    logps = torch.tensor([chosen], requires_grad=True)
    (got,) = torch.autograd.grad(losses.orpo(logps, torch.tensor([-2.0]), weight=1.0).sum(), logps)
    odds = 1 / math.expm1(2.0)
    want = -1 - odds * math.exp(-chosen) / (1 + odds * math.expm1(-chosen))
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_far_pairs_keep_their_gradient() -> None:
    """-log sigmoid(u) at u = -+ 40: u itself, and e^-40; 1 - sigmoid would be 0 there."""
    logps = torch.tensor([400.0, -400.0], requires_grad=True)
    value = losses.dpo(logps - 500, torch.full((2,), -500.0), reference_free=True)
    (grad,) = torch.autograd.grad(value.sum(), logps)
    torch.testing.assert_close(value.detach(), torch.tensor([math.exp(-40), 40.0]))
    torch.testing.assert_close(grad, torch.tensor([-0.1 * math.exp(-40), -0.1]))
    logps = torch.tensor([300.0], requires_grad=True)
    value = losses.kto(logps, torch.zeros(1), torch.tensor([True]), 0.0)
    torch.testing.assert_close(value.item(), math.exp(-30), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, logps)[0].item(), -0.1 * math.exp(-30), rtol=1e-5, atol=0)


def test_modules_and_reductions() -> None:
    logp, _, ref = policies()
    each = losses.preference(losses.dpo, logp, ref, mask=MASK, beta=0.3, reduction="none")
    assert each.shape == (P,)
    for reduction, want in (("none", each), ("sum", each.sum()), ("mean", each.mean())):
        torch.testing.assert_close(nn.DPOLoss(beta=0.3, reduction=reduction)(logp, ref, mask=MASK), want)
    own = nn.PreferenceLoss(lambda chosen, rejected: rejected - chosen, average=True)
    mean = losses.sequence_logp(logp, MASK, average=True)
    torch.testing.assert_close(own(logp, mask=MASK), (mean[P:] - mean[:P]).mean())
    for name, loss in (("IPOLoss", "ipo"), ("ORPOLoss", "orpo"), ("SimPOLoss", "simpo"), ("RPOLoss", "rpo")):
        assert torch.equal(getattr(nn, name)()(logp, *(() if loss in REFERENCE_FREE else (ref,)), mask=MASK),
                           call(loss, logp, ref, MASK))  # fmt: skip
    x, w, ids = torch.randn(B, T, 8), torch.randn(30, 8, requires_grad=True), torch.randint(0, 30, (B, T))
    module = nn.LinearPolicyLoss(nn.KTOLoss(beta=0.2), shift=True)
    module(x, w, ids, ref, torch.arange(B) > 1, 0.0).backward()
    assert w.grad is not None and w.grad.norm() > 0


L = torch.zeros(B, T)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no reference": (lambda: losses.preference(losses.dpo, L), ValueError, "reference_free=True"),
    "odd": (lambda: losses.preference(losses.simpo, L[:3]), ValueError, r"as many, got \(3,\)"),
    "pair": (lambda: losses.simpo(L[0], L[0, :2]), ValueError, r"\(6,\) and \(2,\)"),
    "reference": (lambda: losses.dpo(L[0], L[0], L[0, :2], L[0]), ValueError, r"reference \(2,\)"),
    "smoothing": (lambda: losses.dpo(L[0], L[0], L[0], L[0], label_smoothing=0.7), ValueError, "got 0.7"),
    "ipo": (lambda: losses.ipo(L[0], L[0], L[0], L[0], beta=0.0), ValueError, "beta must be > 0"),
    "rpo": (lambda: losses.rpo(L[0], L[0], L[0], L[0], nll_weight=0.2), ValueError, "chosen_tokens"),
    "kto": (lambda: losses.kto(L[0], L[0], L[0], 0.0), ValueError, "bool"),
    "reduction": (lambda: losses.preference(losses.simpo, L, reduction="max"), ValueError, "'max'"),
    "argument": (lambda: nn.DPOLoss(gamma=1.0), TypeError, "dpo takes no 'gamma'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call_it, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call_it()


def test_what_does_not_fit_is_not_broadcast() -> None:
    pair = torch.zeros(2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"nll must have shape \(2,\), got \(5, 1\)"):
        losses.orpo(*pair, nll=torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"chosen_tokens must have shape \(2,\), got \(5, 1\)"):
        losses.rpo(*pair, *pair, nll_weight=0.2, chosen_tokens=torch.ones(5, 1))
    desirable = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"reference_point.*\(2,\), got \(5, 1\)"):
        losses.kto(*pair, desirable, torch.zeros(5, 1))
    assert losses.kto(*pair, desirable, torch.zeros(1, 1)).shape == (2,)
