"""SphericalLinear against plain SGD on a dense weight, everything that must be refused, and the spherical losses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses
from fastloss.nn import SphericalLinear
from fastloss.spherical import factors
from hard_rows import ROWS, hard_rows
from tolerance import check_close, check_gradient

Loss = Callable[..., Tensor]
FEATURES, CLASSES, BATCH = 12, 90, 8


def z_loss(z: Tensor, y: Tensor, a: float = 1.0, b: float = 0.0, eps: float = 1e-12) -> Tensor:
    deviation = (z.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    standard = (z - z.mean(-1, keepdim=True)) / deviation
    return torch.log1p(torch.exp(a * (b - standard.gather(-1, y)))) / a


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    onehot = F.one_hot(y, z.shape[-1]).to(z.dtype)
    return ((z[..., None, :] - onehot) ** 2).sum(-1)


def taylor(z: Tensor, y: Tensor) -> Tensor:
    t = 1 + z + z**2 / 2
    return -(t.gather(-1, y) / t.sum(-1, keepdim=True)).log()


def spherical(z: Tensor, y: Tensor, eps: float = 1e-2) -> Tensor:
    t = z**2 + eps
    return -(t.gather(-1, y) / t.sum(-1, keepdim=True)).log()


#: name -> (ours, an independent formula of scores [N, V] and listed classes [N, K]); both one value for each listed class
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "z": (losses.z_normalized_loss, z_loss),
    "mse": (losses.one_hot_mse, squared_error),
    "taylor": (losses.log_taylor_softmax, taylor),
    "spherical": (losses.log_spherical_softmax, spherical),
}


def layer(lr: float = 0.05, features: int = FEATURES, **options: Any) -> SphericalLinear:
    return SphericalLinear(features, CLASSES, lr=lr, **{"dtype": torch.float64, "std": 0.3, **options})


def minibatch(batch: int = BATCH, listed: int | None = None, features: int = FEATURES) -> tuple[Tensor, Tensor]:
    """Few classes, so that some are listed by several examples and, with K > 1, several times by one."""
    shape = (batch,) if listed is None else (batch, listed)
    return torch.randn(batch, features, dtype=torch.float64), torch.randint(0, 9, shape)


class Dense:
    """The same layer with W as one tensor, differentiated by autograd, and torch's own SGD."""

    def __init__(self, head: SphericalLinear) -> None:
        self.weight = head.materialize().double().requires_grad_()
        self.bias_input = head.bias_input
        self.sgd = torch.optim.SGD([self.weight], lr=head.lr, weight_decay=head.weight_decay)

    def rows(self, x: Tensor, y: Tensor, formula: Loss) -> Tensor:
        wide = x if self.bias_input is None else F.pad(x, (0, 1), value=self.bias_input)
        return formula(wide @ self.weight.T, y if y.dim() > 1 else y[:, None])

    def step(self, lr: float | None = None) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self.sgd.step()
        self.sgd.zero_grad()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def train_both(
    head: SphericalLinear, dense: Dense, steps: int = 30, loss: str = "z", listed: int | None = None,
    batch: int = BATCH, schedule: Callable[[int], float] | None = None,
) -> None:  # fmt: skip
    """Steps of both side by side: equal losses and input gradients at each, equal weights at the end."""
    ours, formula = LOSSES[loss]
    for number in range(steps):
        x, y = minibatch(batch, listed)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        value = head(mine, y, ours)
        expected = dense.rows(theirs, y, formula).mean()
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) <= 1e-10
        lr = None if schedule is None else schedule(number)
        head.step(lr=lr)
        dense.step(lr)
    check_weights(head, dense)


def check_weights(head: SphericalLinear, dense: Dense, tolerance: float = 1e-9) -> None:
    assert (head.materialize() - dense.weight).abs().max() <= tolerance
    drift = head.check()
    assert max(drift.inverse, drift.gram, drift.total) <= tolerance, drift


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("listed", [None, 3])
def test_equals_dense_sgd(loss: str, listed: int | None) -> None:
    head = layer()
    dense = Dense(head)
    start = dense.weight.detach().clone()
    train_both(head, dense, loss=loss, listed=listed)
    assert (dense.weight - start).norm() > 0.05  # something was learnt


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3},
        {"bias_input": 0.5},
        {"bias_input": 0.5, "weight_decay": 0.1, "stabilize_period": 1},
        {"stabilize_period": 7},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    head = layer(lr=0.2, **options)
    train_both(head, Dense(head), loss="taylor", listed=2)


@pytest.mark.parametrize("batch", [1, FEATURES, 3 * FEATURES])
def test_batch_sizes(batch: int) -> None:
    head = layer()
    train_both(head, Dense(head), batch=batch)


def test_learning_rate_schedule() -> None:
    head = layer(weight_decay=0.2)
    train_both(head, Dense(head), schedule=lambda number: (0.3, 0.0, 0.02)[number % 3])
    head.lr = 0.17
    dense = Dense(head)
    train_both(head, dense, steps=5)


def test_stabilize_and_unfactorize_keep_the_weight() -> None:
    head = layer(lr=0.4)
    dense = Dense(head)
    train_both(head, dense, steps=10, loss="mse")
    for change in (head.stabilize, head.unfactorize, head.refresh, head.stabilize):
        change()
        check_weights(head, dense)
        train_both(head, dense, steps=5, loss="mse")


@pytest.mark.parametrize("corrected", [1, FEATURES // 3, FEATURES // 3 + 1])
def test_singular_values_are_brought_back(corrected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few move into V one by one, more than a third all at once; W stays, also when V takes several blocks."""
    monkeypatch.setattr(factors, "BLOCK", 7 * FEATURES)
    head = layer()
    train_both(head, Dense(head), steps=3)
    left, _, right = torch.linalg.svd(torch.randn(FEATURES, FEATURES, dtype=torch.float64))
    values = torch.full((FEATURES,), 0.01, dtype=torch.float64)
    values[:corrected] = torch.tensor([1e-5, 30.0, 1e-3, 1.0, 0.1], dtype=torch.float64)[:corrected]
    with head.change():
        head.u.copy_((left * values) @ right)
        head.factors.refresh()
    dense = Dense(head)
    head.stabilize()
    check_weights(head, dense)
    assert head.check().condition <= 4
    merged = torch.equal(head.u, torch.eye(FEATURES, dtype=torch.float64))
    assert merged == (corrected > FEATURES / 3)
    train_both(head, dense, steps=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_steps(dtype: torch.dtype) -> None:
    """Each step multiplies directions of U by about -0.9 ... 0.1: without the condition's guard, fp64 is soon used up."""
    head = layer(lr=0.1, stabilize_period=1000, dtype=dtype)
    dense = Dense(head)
    for _ in range(40):
        x, y = minibatch(4)
        x = x / x.norm(dim=1, keepdim=True) * torch.tensor([[2.0], [2.2], [2.3], [1.0]])
        head(x, y, losses.one_hot_mse, reduction="sum").backward()
        dense.rows(x, y, squared_error).sum().backward()
        head.step()
        dense.step()
        check_weights(head, dense, 1e-9 if dtype == torch.float64 else 2e-5)


def test_a_step_that_makes_u_singular() -> None:
    """1 - 2 lr |x|^2 = 0: W loses a rank, the inverse of U does not exist, and the step is right all the same."""
    head = layer(lr=0.125, weight_decay=0.4)
    dense = Dense(head)
    for size in (1, 3):
        x = torch.linalg.qr(torch.randn(FEATURES, size, dtype=torch.float64))[0].T * 2 / (1 - 0.05) ** -0.5
        y = torch.arange(size)
        head(x, y, losses.one_hot_mse, reduction="sum").backward()
        dense.rows(x, y, squared_error).sum().backward()
        head.step()
        dense.step()
        check_weights(head, dense)
        assert torch.equal(head.u, torch.eye(FEATURES, dtype=torch.float64))
    train_both(head, dense, steps=5)


def test_stabilize_comes_with_its_period(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(factors.Factors, "stabilize", lambda self: seen.append(head.steps))
    head = layer(stabilize_period=3)
    for _ in range(7):
        backward(head)
        head.step()
    assert seen == [3, 6]


def test_statistics_are_those_of_the_scores() -> None:
    """And differentiable in any combination, which a user's own loss may need; target lists of any leading shape."""
    head = layer()
    train_both(head, Dense(head), steps=4)
    weight = head.materialize()
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    for target in (torch.randint(0, CLASSES, (2, 3)), torch.randint(0, CLASSES, (2, 3, 4))):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        s = head.row_stats(mine, target)
        z = theirs @ weight.T
        whole = z if target.dim() == 2 else z[..., None, :]
        expected = {
            "target_logit": z.gather(-1, target.reshape(2, 3, -1)).reshape(target.shape),
            "sum": whole.sum(-1), "sumsq": whole.square().sum(-1), "variance": whole.var(-1, unbiased=False),
        }  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(getattr(s, name), value, rtol=1e-10, atol=1e-10)
        weights = [torch.randn_like(value) for value in expected.values()]
        sum((getattr(s, n) * w).sum() for n, w in zip(expected, weights, strict=True)).backward()
        sum((v * w).sum() for v, w in zip(expected.values(), weights, strict=True)).backward()
        assert relative(mine.grad, theirs.grad) <= 1e-10
        head.discard()


def test_variance_far_from_zero() -> None:
    """Scores of 1e4 with a deviation of 1e-2: about the mean nothing cancels."""
    head = layer()
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64) * 1e-3
    weight[:, 0] += 1e4
    head.reset(weight)
    x, y = minibatch()
    x[:, 0] = 1.0
    z = x @ weight.T
    torch.testing.assert_close(head.row_stats(x, y).variance.detach(), z.var(-1, unbiased=False), rtol=1e-7, atol=0.0)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    head = layer(device="cuda", stabilize_period=5, weight_decay=0.1)
    twin = layer(stabilize_period=5, weight_decay=0.1)
    head.load_state_dict(twin.state_dict())
    for _ in range(12):
        x, y = minibatch(listed=2)
        mine, theirs = x.cuda().requires_grad_(), x.clone().requires_grad_()
        head(mine, y.cuda()).backward()
        twin(theirs, y).backward()
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad.cpu(), theirs.grad) <= 1e-10
        head.step()
        twin.step()
    torch.testing.assert_close(head.materialize().cpu(), twin.materialize(), rtol=1e-10, atol=1e-12)
    assert torch.equal(head.topk(mine, 3)[1].cpu(), twin.topk(theirs, 3)[1])


def test_ignored_entries_count_nothing() -> None:
    head, twin = layer(ignore_index=-1), layer(ignore_index=-1)
    twin.load_state_dict(head.state_dict())
    x, y = minibatch(6, 2)
    mine, theirs = x.clone().requires_grad_(), x[[0, 2, 3]].clone().requires_grad_()
    y[1] = y[4] = y[5] = -1
    mine.data[4] = float("nan")  # padding may hold anything
    loss = head(mine, y, reduction="none")
    assert (loss[1] == 0).all()
    head.discard()
    head(mine, y).backward()
    twin(theirs, y[[0, 2, 3]]).backward()
    head.step()
    twin.step()
    torch.testing.assert_close(head.materialize(), twin.materialize(), rtol=1e-13, atol=1e-15)
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad[[0, 2, 3]], theirs.grad)
    assert (mine.grad[[1, 4, 5]] == 0).all()
    y[0, 1] = -1  # one entry of a row that counts
    dense = Dense(head)
    loss = head(x, y)
    z = x @ dense.weight.T
    expected = torch.stack(
        [z_loss(z[i : i + 1], y[i, j].reshape(1, 1)) for i, j in ((0, 0), (2, 0), (2, 1), (3, 0), (3, 1))]
    )
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    expected.mean().backward()
    head.step()
    dense.step()
    check_weights(head, dense)


def test_a_users_loss_gets_nothing_of_ignored_entries() -> None:
    """Even one that does not mask them, where their statistics are constants: no gradient, no step."""
    head = layer()
    dense = Dense(head)
    x, y = minibatch(5, 2)
    y[1], y[3, 0] = -100, -100
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    s = head.row_stats(mine, y)
    (3 * s.target_logit.sum() + s.sum.sum() + s.variance.sum()).backward()
    z = (theirs @ dense.weight.T)[[0, 2, 3, 4]]
    listed = z.gather(1, y[[0, 2, 3, 4]].clamp_min(0))
    keep = torch.ones_like(listed)
    keep[2, 0] = 0
    (3 * (listed * keep).sum() + z.sum() + z.var(1, unbiased=False).sum()).backward()
    assert mine.grad is not None and theirs.grad is not None
    assert relative(mine.grad, theirs.grad) <= 1e-10
    head.step()
    dense.step()
    check_weights(head, dense)


def test_all_ignored_and_empty_batches_move_nothing() -> None:
    head = layer()
    before = head.materialize()
    for x, y in ((minibatch()[0], torch.full((BATCH,), -100)), minibatch(0), minibatch(0, 3)):
        x.requires_grad_()
        head(x, y, reduction="sum").backward()
        head.step()
        assert torch.equal(head.materialize(), before) and x.grad is not None and (x.grad == 0).all()


def test_only_listed_rows_of_v_are_written() -> None:
    head = layer(dtype=torch.float32)
    x, _ = minibatch(3)
    before = head.v.clone()
    head(x, torch.tensor([5, 70, 5])).backward()
    head.step()
    changed = (head.v != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 70]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    """Arithmetic is float64 on what was given; only V and the gradient of the input are rounded."""
    head = layer(dtype=torch.float32, lr=0.3)
    dense = Dense(head)
    for _ in range(30):
        x, y = minibatch()
        mine = x.to(dtype).requires_grad_()
        theirs = mine.detach().double().requires_grad_()
        value = head(mine, y)
        assert value.dtype == torch.float32
        value.backward()
        dense.rows(theirs, y, z_loss).mean().backward()
        assert mine.grad is not None and mine.grad.dtype == dtype and theirs.grad is not None
        check_close(mine.grad, theirs.grad.to(dtype), theirs.grad, dtype)
        head.step()
        dense.step()
    check_weights(head, dense, 1e-6)


def test_autocast_rounds_nothing() -> None:
    """U is taken out of range, so that stepping under autocast has to rewrite all of V."""
    head = layer(dtype=torch.float32, lr=0.1)
    dense = Dense(head)
    start = head.v[50:].clone()
    x, y = minibatch(1)
    x *= 2.1 / x.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(x, y, losses.one_hot_mse).backward()
        head.step()
        head.stabilize()
    dense.rows(x, y, squared_error).mean().backward()
    dense.step()
    assert not torch.equal(head.v[50:], start)
    assert relative(head.materialize().double(), dense.weight) <= 1e-6


def test_accumulation_is_the_sum_of_losses() -> None:
    head = layer(accumulate=3)
    dense = Dense(head)
    for batch in (4, 7, 2):
        x, y = minibatch(batch)
        head(x, y).backward()
        dense.rows(x, y, z_loss).mean().backward()
    assert dense.weight.grad is not None
    dense.weight.grad.mul_(0.25)
    head.step(gradient_scale=0.25)
    dense.step()
    check_weights(head, dense)


def backward(head: SphericalLinear, **options: Any) -> Tensor:
    loss = head(*minibatch())
    loss.backward(**options)
    return loss


def test_misuse_of_backward_and_step_is_refused() -> None:
    head = layer()
    with pytest.raises(RuntimeError, match="nothing to apply"):
        head.step()
    loss = backward(head, retain_graph=True)
    with pytest.raises(RuntimeError, match="count it twice"):
        loss.backward()
    with pytest.raises(RuntimeError, match="wait to be applied"):
        head(*minibatch())
    for pending in (head.stabilize, head.refresh, head.unfactorize, head.state_dict, head.double,
                    lambda: head.reset(head.v), lambda: head.load_state_dict(layer().state_dict())):  # fmt: skip
        with pytest.raises(RuntimeError, match="wait to be applied"):
            pending()
    with torch.no_grad():
        head(*minibatch())  # an evaluation asks for no update
    head.step()
    with pytest.raises(RuntimeError, match="nothing to apply"):
        head.step()
    first, second = head(*minibatch()), head(*minibatch())
    first.backward()
    with pytest.raises(RuntimeError, match="one backward pass too many"):
        second.backward()
    head.discard()
    late = head(*minibatch())
    backward(head)
    head.step()
    with pytest.raises(RuntimeError, match="changed between"):
        late.backward()
    assert not head.pending


def test_eval_mode_gives_input_gradients_and_keeps_nothing() -> None:
    head = layer().eval()
    x, y = minibatch()
    x.requires_grad_()
    head(x, y).backward()
    head(x, y).backward()
    assert x.grad is not None and not head.pending
    with pytest.raises(RuntimeError, match="does not require grad"):
        head(*minibatch()).backward()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    head = layer()
    before = copy.deepcopy(head.state_dict())
    x, y = minibatch()
    x[2, 1] = float("nan")
    head(x, y).backward()
    with pytest.raises(RuntimeError, match="not finite"):
        head.step()
    head.discard()
    for name, value in head.state_dict().items():
        assert value == before[name] if name == "_extra_state" else torch.equal(value, before[name])
    backward(head)
    head.step()


@pytest.mark.parametrize("name", ["v", "u", "inverse", "omega", "gram", "total"])
def test_buffers_written_from_outside_are_noticed(name: str) -> None:
    head = layer()
    loss = head(*minibatch())
    getattr(head, name).mul_(1.5)
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()
    for use in (lambda: head(*minibatch()), head.check, head.materialize, lambda: head.topk(minibatch()[0], 1)):
        with pytest.raises(RuntimeError, match="from outside"):
            use()
    head.reset(torch.randn(CLASSES, FEATURES))
    backward(head)
    getattr(head, name).mul_(1.5)
    with pytest.raises(RuntimeError, match="from outside"):
        head.step()


def test_no_optimizer_and_no_transform_gets_hold_of_the_weight() -> None:
    head = layer()
    assert not list(head.parameters())
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(head.parameters(), lr=0.1)
    x, y = minibatch()
    x.requires_grad_()
    (once,) = torch.autograd.grad(head(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
    head.discard()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda t: head(t, y))(x.detach())
    with pytest.raises(RuntimeError, match="from outside"):
        torch.func.functional_call(head, {"v": head.v.clone()}, (x, y))
    assert not head.pending


def test_conversions_and_copies() -> None:
    head = layer(dtype=torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(3, FEATURES), head).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16 and head.v.dtype == torch.float32 and head.u.dtype == torch.float64
    twin = copy.deepcopy(head)
    x, y = minibatch()
    for one in (head, twin):
        one(x, y).backward()
        one.step()
    assert torch.equal(head.v, twin.v) and head.v is not twin.v


def test_compile_leaves_the_layer_to_eager() -> None:
    head, twin = layer(), layer()
    twin.load_state_dict(head.state_dict())
    body = torch.nn.Linear(FEATURES, FEATURES).double()
    x, y = minibatch()
    torch.compile(lambda x, y: head(body(x).tanh(), y) * 2, backend="eager")(x, y).backward()
    mine = body.weight.grad
    body.weight.grad = None
    (twin(body(x).tanh(), y) * 2).backward()
    torch.testing.assert_close(mine, body.weight.grad)
    head.step()
    twin.step()
    torch.testing.assert_close(head.materialize(), twin.materialize())


def test_resumes_bit_equal(tmp_path: Path) -> None:
    head = layer(stabilize_period=5, weight_decay=0.1)
    for _ in range(7):
        backward(head)
        head.step()
    head.lr = 0.021
    torch.save(head.state_dict(), tmp_path / "state.pt")
    twin = layer(lr=0.9, stabilize_period=5, weight_decay=0.1)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert twin.lr == 0.021 and twin.steps == 7
    for _ in range(7):
        x, y = minibatch()
        for one in (head, twin):
            one(x, y).backward()
            one.step()
    for name in ("v", "u", "inverse", "omega", "gram", "total"):
        assert torch.equal(getattr(head, name), getattr(twin, name)), name


def test_loading_what_does_not_fit_loads_nothing() -> None:
    head = layer()
    before = {name: getattr(head, name).clone() for name in ("v", "u")}
    good = layer().state_dict()
    bad: list[dict[str, Any]] = [
        SphericalLinear(FEATURES, CLASSES + 1, lr=0.1, dtype=torch.float64).state_dict(),
        SphericalLinear(FEATURES + 1, CLASSES, lr=0.1, dtype=torch.float64).state_dict(),
        layer(dtype=torch.float32).state_dict(),
        {name: value for name, value in good.items() if name != "gram"},
        {**good, "_extra_state": {"steps": 3}},
    ]
    for state, strict in itertools.product(bad, (True, False)):
        with pytest.raises(RuntimeError, match="nothing of SphericalLinear was loaded"):
            head.load_state_dict(state, strict=strict)
        assert all(torch.equal(getattr(head, name), value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="Missing"):
        head.load_state_dict({})
    backward(head)
    head.step()


def test_arguments_are_checked() -> None:
    for options, error in (
        ({"in_features": 0}, "in_features"), ({"num_classes": 2.5}, "num_classes"), ({"lr": -0.1}, "lr"),
        ({"lr": float("nan")}, "lr"), ({"weight_decay": -1.0}, "weight_decay"), ({"weight_decay": 11.0}, "weight_decay"),
        ({"accumulate": 0}, "accumulate"), ({"stabilize_period": 0}, "stabilize_period"), ({"std": 0.0}, "std"),
        ({"bias_input": 0.0}, "bias_input"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            SphericalLinear(**{"in_features": 3, "num_classes": 4, "lr": 0.1, **options})
    with pytest.raises(TypeError, match="bfloat16"):
        SphericalLinear(3, 4, lr=0.1, dtype=torch.bfloat16)
    head = layer()
    x, y = minibatch()
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: head(x[:, 1:], y), ValueError, "input must have shape"),
        (lambda: head(x.long(), y), TypeError, "floating"),
        (lambda: head(x, y[1:]), ValueError, "target must have shape"),
        (lambda: head(x, torch.zeros(BATCH, 0, dtype=torch.int64)), ValueError, "target must have shape"),
        (lambda: head(x, y.double()), TypeError, "class ids"),
        (lambda: head(x, torch.full_like(y, CLASSES)), IndexError, str(CLASSES)),
        (lambda: head(x, torch.full_like(y, -1)), IndexError, "-1"),
        (lambda: head(x, y, reduction="max"), ValueError, "reduction"),
        (lambda: head(x, y, gamma=2.0), TypeError, "gamma"),
        (lambda: head(x, y, lambda s: s.sum.mean()), ValueError, "one value a row"),
        (lambda: head(x, y, losses.cross_entropy), AttributeError, "does not compute 'nll'"),
        (lambda: head.reset(x), ValueError, "weight must be floating"),
        (lambda: head.reset(head.v / 0), ValueError, "weight must be finite"),
        (lambda: head.topk(x, CLASSES + 1), ValueError, "k must be"),
        (lambda: head.scores(x, y[:, None].expand(2, BATCH, 1)), ValueError, "classes must have shape"),
        (lambda: head.scores(x, y + CLASSES), IndexError, "class ids"),
        (lambda: head.step(lr=-1.0), ValueError, "lr"),
        (lambda: head.step(gradient_scale=float("inf")), ValueError, "gradient_scale"),
    ]
    for call, kind, words in calls:
        with pytest.raises(kind, match=words):
            call()
    assert not head.pending


def test_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    head = layer(bias_input=1.0)
    train_both(head, Dense(head), steps=5)
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    z = F.pad(x, (0, 1), value=1.0) @ head.materialize().T
    shared, own = torch.tensor([4, 4, 80]), torch.randint(0, CLASSES, (2, 3, 5))
    torch.testing.assert_close(head.scores(x, shared), z[..., shared])
    torch.testing.assert_close(head.scores(x, own), z.gather(-1, own))
    for block in (1, 60, 1 << 20):
        monkeypatch.setattr("fastloss.spherical.prediction.BLOCK", block)
        for k in (1, 4, CLASSES):
            values, classes = head.topk(x, k)
            torch.testing.assert_close(values, z.topk(k).values)
            torch.testing.assert_close(z.gather(-1, classes), values)


def train_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # rank 1 would start from other weights
    head = layer(process_group=dist.group.WORLD, stabilize_period=3)
    data = torch.load(f"{folder}/data.pt")
    if rank == 0:
        torch.save(head.state_dict(), f"{folder}/start.pt")
    for pair in data:
        head(*pair[rank]).backward()
        head.step()
    torch.save(head.state_dict(), f"{folder}/end{rank}.pt")
    head(*data[0][rank]).backward()
    try:
        head.step(lr=0.1 + rank)
    except RuntimeError as error:
        torch.save(str(error), f"{folder}/error{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_equals_one_process(tmp_path: Path) -> None:
    """Both ranks end with the same bits, those of one process that sees both minibatches; batch sizes may differ."""
    data = [[minibatch(4 + step % 2, 2), minibatch(3, 2)] for step in range(6)]
    torch.save(data, tmp_path / "data.pt")
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path),), nprocs=2)
    head = layer(accumulate=2, stabilize_period=3)
    head.load_state_dict(torch.load(tmp_path / "start.pt"))
    for pair in data:
        for x, y in pair:
            head(x, y).backward()
        head.step(gradient_scale=0.5)
    for rank in range(2):
        end = torch.load(tmp_path / f"end{rank}.pt")
        for name in ("v", "u", "inverse", "omega", "gram", "total"):
            assert torch.equal(end[name], getattr(head, name)), (rank, name)
        assert "ranks differ" in torch.load(tmp_path / f"error{rank}.pt")


# The losses on RowStats


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_in_float64(loss: str) -> None:
    ours, formula = LOSSES[loss]
    z = torch.randn(6, 37, dtype=torch.float64) * 3 - 1
    y = torch.randint(0, 37, (6,))
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = fastloss.row_loss(mine, y, ours, reduction="none")
    expected = formula(theirs, y[:, None])[:, 0]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn(6, dtype=torch.float64)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    assert relative(mine.grad, theirs.grad) <= 1e-10


def test_parameters_of_losses() -> None:
    z, y = torch.randn(5, 20, dtype=torch.float64), torch.randint(0, 20, (5,))
    s = fastloss.row_stats(z, y, stats=("sum", "sumsq"))
    torch.testing.assert_close(losses.z_normalized_loss(s, a=0.7, b=9.0), z_loss(z, y[:, None], 0.7, 9.0)[:, 0])
    torch.testing.assert_close(losses.log_spherical_softmax(s, eps=2.0), spherical(z, y[:, None], 2.0)[:, 0])
    moved = fastloss.row_stats(7 * z + 300, y, stats=("sum", "sumsq"))
    torch.testing.assert_close(losses.z_normalized_loss(moved), losses.z_normalized_loss(s))
    for bad in ({"a": 0.0}, {"a": float("inf")}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            losses.z_normalized_loss(s, **bad)
    with pytest.raises(ValueError, match="eps"):
        losses.log_spherical_softmax(s, eps=-1.0)
    ignored = fastloss.row_stats(z, y.index_fill(0, torch.tensor([2]), -100), stats=("sum", "sumsq"))
    for ours, _ in LOSSES.values():
        assert ours(ignored)[2] == 0
        with pytest.raises(ValueError, match="probabilities"):
            fastloss.row_loss(z, z.softmax(-1), ours)
        with pytest.raises(ValueError, match="got none"):
            fastloss.row_loss(z, None, ours)
        with pytest.raises(ValueError, match="column_weight"):
            fastloss.row_loss(z, y, ours, column_weight=torch.rand(20))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ROWS)
def test_hard_rows_in_float32(name: str, loss: str) -> None:
    """As accurate as torch, but for what the sum of squares about the row's maximum loses where that is far away."""
    ours, formula = LOSSES[loss]
    logits, y = hard_rows(name, torch.float32)
    mine, single, double = (
        logits.detach().to(t).clone().requires_grad_() for t in (torch.float32,) * 2 + (torch.float64,)
    )
    value = fastloss.row_loss(mine, y, ours, reduction="none")
    value.sum().backward()
    counts = y != -100
    assert mine.grad is not None
    assert (value[~counts] == 0).all() and (mine.grad[~counts] == 0).all()
    known = torch.where(counts, y, 0)[:, None]
    found, exact = formula(single, known)[:, 0], formula(double, known)[:, 0]
    finite = logits.isfinite().all(1)
    assert not value[counts & ~finite].isfinite().any()
    keep = counts & finite
    if not keep.any():
        return
    z = logits[keep].double()
    away = (z.amax(1) - z.mean(1)) ** 2 / z.var(1, unbiased=False).clamp_min(1e-12)
    k = 4.0 * (1 + float(away.max()))
    found[keep].sum().backward()
    exact[keep].sum().backward()
    assert single.grad is not None and double.grad is not None
    check_close(value[keep], found[keep], exact[keep], torch.float32, k)
    check_gradient(mine.grad[keep], single.grad[keep], double.grad[keep], torch.float32, k)
