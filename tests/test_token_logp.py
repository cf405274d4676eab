"""Log-probabilities of tokens under a head, and sums of them over padded and packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import Sequences
from tolerance import check_close, check_gradient

B, T, D, V = 3, 7, 6, 29


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, bias = (torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in ((B, T, D), (V, D), (V,)))
    target = torch.randint(0, V, (B, T))
    target[1, 4:] = target[2, 0] = -100
    return x, w, bias, target


def definition(
    z: Tensor, target: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    shift: bool = False, ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log-probabilities, entropies), a temperature on top of whatever makes the logits."""
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = (z / temperature).softmax(-1)
    if shift:
        target = torch.cat((target[:, 1:], torch.full((B, 1), ignore_index)), 1)
    counted = target != ignore_index
    logp = p.gather(-1, target.clamp(min=0)[..., None])[..., 0].log()
    entropy = -(p * p.log()).sum(-1)
    return torch.where(counted, logp, 0.0), torch.where(counted, entropy, 0.0)


SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.6}, {"temperature": 1.7, "softcap": 2.5}, {"logit_scale": 0.4, "softcap": 3.0},
    {"shift": True, "temperature": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_token_logp(settings: dict[str, Any], linear: bool, dtype: torch.dtype) -> None:
    """Value and gradients of log-probabilities and entropies together, under a random cotangent."""
    x, w, bias, target = problem(dtype)
    u, v = torch.randn(2, B, T)

    def scalar(logp: Tensor, entropy: Tensor) -> Tensor:
        return (u.to(logp.dtype) * logp + v.to(logp.dtype) * entropy).sum()

    def both(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return definition(leaves[0] @ leaves[1].T + leaves[2] if linear else leaves[0], target, **settings)

    leaves = [x, w, bias] if linear else [(x @ w.T + bias).detach().requires_grad_()]
    if linear:
        out = fastloss.token_logp(x, w, target, linear_bias=bias, entropy=True, **settings)
    else:
        out = fastloss.token_logp_of_logits(leaves[0], target, entropy=True, **settings)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth, plain = both(*wide), both(*leaves)
    for a, b, r in zip(out, plain, truth, strict=True):
        check_close(a, b, r, dtype, 1e3 if dtype == torch.float64 else 8)
    alone = fastloss.token_logp(x, w, target, linear_bias=bias, **settings)
    torch.testing.assert_close(alone, out[0])
    grads = [torch.autograd.grad(scalar(*t), at) for t, at in ((out, leaves), (plain, leaves), (truth, wide))]
    for a, b, r in zip(*grads, strict=True):
        if dtype == torch.float64:
            assert (a - r).norm() <= 1e-10 * r.norm()
        else:
            check_gradient(a.reshape(1, -1), b.reshape(1, -1), r.reshape(1, -1), dtype, 16)


def test_ignored_tokens_and_no_grad() -> None:
    x, w, _, target = problem(torch.float32)
    logp, entropy = fastloss.token_logp(x, w, target, entropy=True)
    assert (logp[target == -100] == 0).all() and (entropy[target == -100] == 0).all() and (logp[target >= 0] < 0).all()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        cached = fastloss.token_logp(x, w, target)
    assert not saved and not cached.requires_grad and torch.equal(cached, fastloss.token_logp(x, w, target))


def test_packed_rows_do_not_look_across_a_border() -> None:
    x, w = torch.randn(1, 10, D), torch.randn(V, D)
    ids, sequence = torch.randint(0, V, (1, 10)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, -1]])
    packed = fastloss.token_logp(x, w, ids, shift=True, sequence_ids=sequence)
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        alone = fastloss.token_logp(x[:, start:stop], w, ids[:, start:stop], shift=True)
        torch.testing.assert_close(packed[:, start:stop], alone)
    mask = fastloss.token_mask(ids, shift=True, sequence_ids=sequence)
    assert mask.tolist() == [[True, True, True, False, True, True, False, True, False, False]]
    assert torch.equal(mask, packed != 0)


def test_a_limit_changes_nothing() -> None:
    x, w, _, target = problem(torch.float64)
    got, want = (fastloss.token_logp(x, w, target, max_extra_bytes=limit) for limit in (2 * V * 8, None))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(11,), (1, 11)])
def test_segments(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, 0, 0, -1, 2, 3, 3, 3, 0, -5, 2]).reshape(shape)
    dirty = torch.where(ids < 0, torch.nan, values)
    total, mean = fastloss.segment_sum(dirty, ids, 5), fastloss.segment_mean(dirty, ids, 5)
    for k in range(5):
        members = values[ids == k]
        assert total[k].item() == pytest.approx(members.sum().item(), abs=1e-14)
        assert mean[k].item() == pytest.approx(members.mean().item() if len(members) else 0.0, abs=1e-14)
    (grad,) = torch.autograd.grad((torch.arange(5.0) * total).sum(), values)
    assert torch.equal(grad, ids.clamp(min=0).double() * (ids >= 0))


def test_cumulative_lengths() -> None:
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert fastloss.segments_of_cu_seqlens(ends, 7).tolist() == [0, 0, 0, 2, 2, -1, -1]
    s = Sequences.from_cu_seqlens(ends, torch.zeros(7), mask=torch.tensor([1, 0, 1, 1, 1, 1, 1]))
    assert s.sizes(torch.zeros(())).tolist() == [2.0, 0.0, 2.0]
    assert s.mask.tolist() == [True, False, True, True, True, False, False]
    assert s.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0]


def test_compiles_whole() -> None:
    """No number is read back: one graph, also of a packed batch."""
    ids = torch.tensor([0, 0, 1, 1, 1, -1])
    logp = torch.randn(6, requires_grad=True)

    def f(logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
        return fastloss.losses.grpo(logp, old, a, mask=Sequences.packed(ids, 2), aggregation="seq-mean-token-mean")

    arguments = (logp, torch.randn(6), torch.randn(2))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="eager")(*arguments), f(*arguments))


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "probabilities": (dict(target=torch.rand(B, T)), TypeError, "token ids"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be a number > 0, got 0.0"),
    "sequence_ids": (dict(sequence_ids=torch.zeros(T, dtype=torch.long)), ValueError, r"\(3, 7\), got \(7,\)"),
    "target": (dict(target=torch.zeros(B, T - 1, dtype=torch.long)), ValueError, r"\(3, 7\), got \(3, 6\)"),
    "range": (dict(target=torch.full((B, T), V)), IndexError, str(V)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    x, w, _, target = problem(torch.float32)
    arguments, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        fastloss.token_logp(x, w, **({"target": target} | arguments))


def test_segment_mistakes_are_named() -> None:
    with pytest.raises(IndexError):
        fastloss.segment_sum(torch.zeros(3), torch.tensor([0, 1, 2]), 2)
    with pytest.raises(TypeError, match="integer"):
        fastloss.segment_sum(torch.zeros(3), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="one shape"):
        fastloss.segment_sum(torch.zeros(3), torch.zeros(2, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="cu_seqlens"):
        fastloss.segments_of_cu_seqlens(torch.zeros(2, 2, dtype=torch.long), 3)


def test_shift_of_rows_without_tokens() -> None:
    target = torch.zeros(2, 0, dtype=torch.int64)
    assert fastloss.token_logp(torch.zeros(2, 0, 8), torch.randn(5, 8), target, shift=True).shape == (2, 0)
    assert fastloss.token_mask(target, shift=True).shape == (2, 0)


def test_sequence_ids_are_integers() -> None:
    target = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
        fastloss.token_mask(target, shift=True, sequence_ids=torch.rand(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segments_of_16_bits_are_added_in_32(dtype: torch.dtype) -> None:
    values, segments = torch.ones(5000, dtype=dtype), torch.zeros(5000, dtype=torch.int64)
    assert fastloss.segment_sum(values, segments, 1).item() == torch.tensor(5000, dtype=dtype)
    assert fastloss.segment_mean(2 * values, segments, 1).item() == 2
