"""Policy losses, their KL terms, advantages and aggregation: each against its definition, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import Sequences, losses
from token_problem import ADVANTAGE, LENGTHS, MASK, B, T, old_and_reference, pack, policies, through_head

Scalar = Callable[..., Tensor]


def rows(mask: Tensor) -> list[list[tuple[int, int]]]:
    """Indices of the tokens that count, by sequence."""
    return [[(b, t) for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]


def token_mean(token: Scalar, mask: Tensor) -> Tensor:
    found = [token(*i) for row in rows(mask) for i in row]
    return sum(found[1:], found[0]) / len(found)


def sequence_mean(token: Scalar, mask: Tensor) -> Tensor:
    found = [sum((token(*i) for i in row), torch.zeros(())) / len(row) for row in rows(mask) if row]
    return sum(found[1:], found[0]) / len(found)


def clipped(rho: Tensor, a: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """PPO by cases: good tokens gain no more than 1 + high, bad ones lose no less than 1 - low and no more than c."""
    if a >= 0:
        return -a * (rho if rho < 1 + high else rho.new_tensor(1 + high))
    bounded = rho if rho > 1 - low else rho.new_tensor(1 - low)
    return -a * (bounded if dual is None or bounded < dual else bounded.new_tensor(dual))


def ratio(new: Tensor, old: Tensor) -> Tensor:
    return new.exp() / old.exp().to(new.dtype)


def sequence_ratio(new: Tensor, old: Tensor, mask: Tensor, b: int) -> Tensor:
    inside = [ratio(new[b, t], old[b, t]) for t in range(T) if mask[b, t]]
    return math.prod(inside[1:], start=inside[0]) ** (1 / len(inside))


def oracle_rec(
    new: Tensor, old: Tensor, a: Tensor, mask: Tensor, b: int, t: int, *, mode: str, weight: str = "none",
    regularizer: str = "none", strength: float = 0.0, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    rho = ratio(new[b, t], old[b, t]).item()
    whole = sequence_ratio(new, old, mask, b).item()
    used, advantage = whole if mode == "gspo-one-side" else rho, float(a[b])
    inside = {
        "none": True,
        "one-side": (advantage >= 0 and used <= 1.2) or (advantage <= 0 and used >= 0.8),
        "two-side": 0.8 <= used <= 1.2,
        "ring": 0.8 <= used <= 1.2 or (advantage >= 0 and used <= 0.4) or (advantage <= 0 and used >= 3.0),
    }[mode.removeprefix("gspo-")]
    factor = {
        "none": 1.0, "importance": rho, "gspo-importance": whole, "advantage": math.exp(advantage / temperature),
    }[weight]  # fmt: skip
    loss = -advantage * factor * inside * new[b, t]
    if regularizer == "k2":
        loss = loss + strength * (new[b, t] - old[b, t].to(new.dtype)).square()
    if regularizer == "forward-kl":
        loss = loss - strength * new[b, t]
    return loss


def case(name: str, **arguments: Any) -> Any:
    return pytest.param(name, arguments, id="-".join([name, *map(str, arguments.values())]))


REC = [
    case("rec", mode=mode, weight=weight)
    for mode in ("none", "one-side", "two-side", "ring", "gspo-one-side")
    for weight in ("none", "importance", "advantage")
] + [
    case("rec", mode="one-side", weight="gspo-importance"),
    case("rec", mode="none", regularizer="k2", strength=0.3),
    case("rec", mode="two-side", regularizer="forward-kl", strength=0.2),
    case("rec", mode="none", weight="advantage", temperature=0.5),
]
CASES = [
    case("policy_gradient"), case("opmd"), case("opmd", tau=0.5), case("asymre"), case("ppo_clip"),
    case("ppo_clip", clip_low=0.1, clip_high=0.4, dual_clip=1.5), case("grpo"), case("grpo", dual_clip=1.3),
    case("grpo", kl="k3", kl_weight=0.5), case("grpo", kl="k2", kl_weight=0.5),
    case("grpo", kl="corrected_k3", kl_weight=0.5), case("gspo"), case("gspo", clip_low=0.2, clip_high=0.3),
    case("cispo"), case("cispo", clip_low=0.2, clip_high=0.1), case("topr"), case("topr", threshold=-0.8),
    case("sapo"), case("sapo", tau_positive=2.0, tau_negative=0.5), case("sapo", constant_gate=True), *REC,
]  # fmt: skip


def expected(name: str, o: dict[str, Any], new: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Every loss from its definition, one token at a time."""
    a = ADVANTAGE.to(new.dtype)

    def rho(b: int, t: int) -> Tensor:
        return ratio(new[b, t], old[b, t])

    def ppo(b: int, t: int) -> Tensor:
        dual = o.get("dual_clip", 3.0 if name == "grpo" else None)
        return clipped(rho(b, t), a[b], o.get("clip_low", 0.2), o.get("clip_high", 0.2), dual)

    def kl(b: int, t: int) -> Tensor:
        q = ref[b, t].exp().to(new.dtype) / new[b, t].exp()
        k3 = q - 1 - q.log()
        which = {"k2": 0.5 * q.log().square(), "k3": k3, "corrected_k3": rho(b, t).clamp(max=2.0) * k3}
        return ppo(b, t) + o["kl_weight"] * which[o["kl"]]

    def gate(b: int, t: int) -> Tensor:
        tau = o.get("tau_positive", 1.0) if a[b] > 0 else o.get("tau_negative", 1.05)
        return 4 / tau / (1 + torch.exp(-tau * (rho(b, t) - 1)))

    def sapo(b: int, t: int) -> Tensor:
        return -a[b] * (gate(b, t).detach() * new[b, t] if o.get("constant_gate") else gate(b, t))

    def gspo(b: int, t: int) -> Tensor:  # one number a sequence: the same for all its tokens
        s = sequence_ratio(new, old, mask, b)
        return clipped(s, a[b], o.get("clip_low", 0.0003), o.get("clip_high", 0.0004), None)

    def cispo(b: int, t: int) -> Tensor:
        w = min(max(rho(b, t).item(), 1 - o.get("clip_low", 1.0)), 1 + o.get("clip_high", 0.28))
        return -a[b] * w * new[b, t]

    def topr(b: int, t: int) -> Tensor:
        return -a[b] * (1.0 if a[b] > o.get("threshold", 0.0) else min(rho(b, t).item(), 1.0)) * new[b, t]

    def plain(b: int, t: int) -> Tensor:
        return -a[b] * new[b, t] / (1 + (o.get("tau", 1.0) if name == "opmd" else 0.0))

    def rec(b: int, t: int) -> Tensor:
        return oracle_rec(new, old, a, mask, b, t, **o)

    token = {
        "ppo_clip": ppo, "grpo": kl if "kl" in o else ppo, "sapo": sapo, "gspo": gspo, "cispo": cispo, "topr": topr,
        "rec": rec,
    }.get(name, plain)  # fmt: skip
    by_sequence = name in ("gspo", "sapo") or o.get("mode") == "gspo-one-side"
    return (sequence_mean if by_sequence else token_mean)(token, mask)


def arguments_of(name: str, o: dict[str, Any], ref: Tensor) -> dict[str, Any]:
    names = {"mode": "clip_mode", "strength": "regularizer_weight"}
    given = {names.get(key, key): value for key, value in o.items()}
    return given | ({"reference_logp": ref} if "kl" in o else {})


def call(name: str, logp: Tensor, old: Tensor, advantage: Tensor, mask: Any, **arguments: Any) -> Tensor:
    loss = getattr(losses, name)
    old_too = () if name in ("policy_gradient", "opmd", "asymre") else (old,)
    return loss(logp, *old_too, advantage, mask=mask, **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "o"), CASES)
def test_loss_is_its_definition(name: str, o: dict[str, Any], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(int(torch.randint(0, 2**31, ())))  # as through_head will
    old, ref = old_and_reference(spread={"gspo-one-side": 0.1, "ring": 2.0}.get(o.get("mode", ""), 0.4))
    torch.set_rng_state(state)
    through_head(
        lambda logp, mask: call(name, logp, old.to(dtype), ADVANTAGE, mask, **arguments_of(name, o, ref.to(dtype))),
        lambda logp, mask: expected(name, o, logp, old.to(dtype), ref.to(dtype), mask),
        dtype,
    )


NAMES = sorted({p.values[0] for p in CASES})
EVERY_LOSS = (
    [(name, {}) for name in NAMES]
    + [("grpo", {"kl": k, "kl_weight": 0.1}) for k in ("k1", "k2", "k3", "low_var", "corrected_k3")]
    + [
        ("rec", {"mode": m, "weight": "importance", "regularizer": "k2", "strength": 0.1})
        for m in ("ring", "gspo-one-side")
    ]
)


@pytest.mark.parametrize(("name", "o"), EVERY_LOSS)
def test_masked_tokens_add_exactly_nothing(name: str, o: dict[str, Any]) -> None:
    """NaN and infinities where no token is, in every operand; and a sequence without tokens; and none at all."""
    logp, old, ref = policies()
    clean = call(name, logp, old, ADVANTAGE, MASK, **arguments_of(name, o, ref))
    bad = torch.tensor([torch.nan, -torch.inf, torch.inf])[torch.arange(B * T).reshape(B, T) % 3]
    dirty = [torch.where(MASK, t, bad) for t in (logp, old, ref)]
    leaf = dirty[0].requires_grad_()
    advantage = torch.where(MASK, ADVANTAGE[:, None].float(), bad)
    value = call(name, leaf, dirty[1], advantage, MASK.int(), **arguments_of(name, o, dirty[2]))
    (grad,) = torch.autograd.grad(value, leaf)
    assert torch.equal(value, clean) and grad.isfinite().all()
    assert (grad[~MASK] == 0).all() and (grad[MASK] != 0).any()

    fewer = torch.cat((MASK, torch.zeros(1, T, dtype=torch.bool)))
    more = [torch.cat((t, torch.full((1, T), torch.nan))) for t in (logp, old, ref)]
    extra = torch.cat((ADVANTAGE, torch.tensor([torch.nan])))
    assert torch.equal(call(name, more[0], more[1], extra, fewer, **arguments_of(name, o, more[2])), clean)

    none = call(name, leaf, dirty[1], ADVANTAGE, torch.zeros_like(MASK), **arguments_of(name, o, dirty[2]))
    (grad,) = torch.autograd.grad(none, leaf)
    assert none == 0 and (grad == 0).all()


@pytest.mark.parametrize(("name", "o"), EVERY_LOSS)
def test_packed_is_padded(name: str, o: dict[str, Any]) -> None:
    logp, old, ref = (t.requires_grad_() for t in policies(torch.float64))
    (flat, flat_old, flat_ref), ids = pack(logp, old, ref)
    padded = call(name, logp, old, ADVANTAGE, MASK, **arguments_of(name, o, ref))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    for s in (Sequences.packed(ids, B), Sequences.from_cu_seqlens(ends, flat)):
        packed = call(name, flat, flat_old, ADVANTAGE, s, **arguments_of(name, o, flat_ref))
        torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(packed, logp, retain_graph=True), torch.autograd.grad(padded, logp, retain_graph=True),
            rtol=1e-12, atol=1e-14,
        )  # fmt: skip
    assert torch.autograd.grad(padded, (old, ref), allow_unused=True) == (None, None), "they are constants"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("name", "o"), EVERY_LOSS)
def test_extreme_ratios_stay_finite(name: str, o: dict[str, Any], sign: float, dtype: torch.dtype) -> None:
    logp = torch.full((B, T), -1e4 if sign < 0 else -0.5, dtype=dtype)
    other = torch.full((B, T), -0.5 if sign < 0 else -1e4, dtype=dtype)
    logp.requires_grad_()
    value = call(name, logp, other, ADVANTAGE, MASK, **arguments_of(name, o, other))
    (grad,) = torch.autograd.grad(value, logp)
    assert value.dtype == torch.float32 and value.isfinite() and grad.isfinite().all()


def test_dual_clip_takes_the_gradient_of_bad_tokens_far_away() -> None:
    logp = torch.tensor([[0.0]], requires_grad=True)
    value = losses.grpo(logp, torch.tensor([[-5.0]]), torch.tensor([-1.0]))
    assert value == 3.0 and torch.autograd.grad(value, logp)[0] == 0
    value = losses.ppo_clip(logp, torch.tensor([[-5.0]]), torch.tensor([-1.0]))
    torch.testing.assert_close(torch.autograd.grad(value, logp)[0].item(), math.exp(5.0))


def test_topr_tapers_at_its_threshold() -> None:
    """At A = threshold a token is a bad one: its weight is min(rho, 1); above it 1."""
    logp, half = torch.zeros(1, 1), torch.full((1, 1), math.log(2.0))  # rho = 1/2
    for threshold, weight in ((-0.75, 0.5), (-1.0, 1.0)):
        leaf = logp.clone().requires_grad_()
        value = losses.topr(leaf, half, torch.tensor([-0.75]), threshold=threshold)
        assert torch.autograd.grad(value, leaf)[0].item() == pytest.approx(0.75 * weight)


def test_an_unknown_kl_is_named_without_a_reference_too() -> None:
    tokens, advantage = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(ValueError, match=r"kl must be one of k1, .*; got 'k4'"):
        losses.grpo(tokens, tokens, advantage, kl="k4")
