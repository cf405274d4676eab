"""PyTorch's own samples and error inputs for every loss, run through ours (value, gradient, second backward, input untouched)."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastloss
from tolerance import check_close

FUSED = ("cross_entropy", "linear_cross_entropy", "binary_cross_entropy_with_logits", "kl_div")
#: Modules of ours, and how many samples module_db has at least.
MODULES = {"CrossEntropyLoss": 100, "LinearCrossEntropyLoss": 100, "BCEWithLogitsLoss": 6, "KLDivLoss": 4}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOSSES = {op.name.rsplit(".", 1)[-1]: op for op in op_db if op.name.startswith("nn.functional.")}
PASSED_THROUGH = sorted(set(fastloss.functional.__all__) - set(FUSED))


@pytest.fixture(autouse=True)
def kernels_for_small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's samples are far below the size from which pointwise kernels pay."""
    monkeypatch.setattr(fastloss.pointwise, "SMALL", 0)


def leaves(tree: Any) -> Any:
    """A copy of a sample's arguments whose tensors are leaves of their own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    if isinstance(tree, (tuple, list)):
        return type(tree)(leaves(t) for t in tree)
    return {k: leaves(t) for k, t in tree.items()} if isinstance(tree, dict) else tree


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    return (
        [x for t in tree for x in tensors(t)]
        if not isinstance(tree, (str, int, float, type(None))) and hasattr(tree, "__iter__")
        else []
    )


def widened(tree: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(tree, Tensor):
        wide = tree.detach().double() if tree.is_floating_point() else tree
        return wide.requires_grad_(tree.requires_grad)
    if isinstance(tree, (tuple, list)):
        return type(tree)(widened(t) for t in tree)
    return {k: widened(t) for k, t in tree.items()} if isinstance(tree, dict) else tree


def no_chunks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """torch's chunked head refuses float64 with some options; they do not change the value."""
    return {"options": None} if "options" in kwargs else {}


def same(ours: Tensor, theirs: Tensor, truth: Tensor | None, dtype: torch.dtype) -> None:
    """32 and 64 bits: equal to torch. 16 bits: as close to float64 as torch is, up to rounding.

    k = 16: with four rows of inputs up to 9, terms of a gradient cancel to a tenth of their size.
    """
    if truth is None:
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        check_close(ours, theirs, truth, dtype, k=16)


def compare(op: Any, ours: Any, sample: Any, dtype: torch.dtype, wide_op: Any = None) -> None:
    wide_op = op if wide_op is None else wide_op
    given = leaves((sample.input, sample.args, sample.kwargs))
    theirs = leaves(given)
    before = [t.detach().clone() for t in tensors(given)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = op(theirs[0], *theirs[1], **theirs[2])
    got = ours(given[0], *given[1], **given[2])
    exact = leaves(widened(given)) if dtype in (torch.bfloat16, torch.float16) else None
    truth = wide_op(exact[0], *exact[1], **{**exact[2], **no_chunks(exact[2])}) if exact else None
    assert got.dtype == want.dtype and got.shape == want.shape
    same(got, want, truth, dtype)
    if want.requires_grad:
        assert got.requires_grad
        cotangent = torch.randn_like(want)
        mine, yours = ([t for t in tensors(g) if t.requires_grad] for g in (given, theirs))
        first = torch.autograd.grad(got, mine, cotangent, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(want, yours, cotangent, allow_unused=True)
        exact_grads: Any = [None] * len(first)
        if exact:
            wide = [t for t in tensors(exact) if t.requires_grad]
            exact_grads = torch.autograd.grad(truth, wide, cotangent.double(), allow_unused=True)
        for a, b, r in zip(first, expected, exact_grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:  # a gradient of one dimension is one row, whose scale is that of its largest entry
                same(*(t if t is None or t.dim() > 1 else t.reshape(1, -1) for t in (a, b, r)), dtype)
        for a, b in zip(torch.autograd.grad(got, mine, cotangent, allow_unused=True), first, strict=True):
            assert a is None or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), "second backward differs"
    for t, b in zip(tensors(given), before, strict=True):
        assert torch.equal(torch.nan_to_num(t.detach()), torch.nan_to_num(b)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", FUSED)
def test_op_samples(name: str, dtype: torch.dtype) -> None:
    op, ours, count = LOSSES.get(name), getattr(fastloss.functional, name), 0
    if op is None:
        pytest.skip(f"this torch has no {name} in op_db")
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        compare(op, ours, sample, dtype)
        count += 1
    assert count >= 16


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "kl_div"])
def test_op_samples_without_a_trained_target(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of the target goes to torch, and so would all of torch's samples: here only the input is trained."""
    calls, run = [], fastloss.registry.run
    monkeypatch.setattr(fastloss.registry, "run", lambda op, *args: calls.append(op) or run(op, *args))
    for sample in LOSSES[name].sample_inputs("cpu", dtype, requires_grad=True):
        for t in tensors((sample.args, sample.kwargs)):
            t.requires_grad_(False)
        compare(LOSSES[name], getattr(fastloss.functional, name), sample, dtype)
    kernels = dtype != torch.float64 and fastloss.compiled.MISSING is None
    assert (calls.count("pointwise_loss") >= 8) == kernels, calls


@pytest.mark.parametrize("name", FUSED[:2])
def test_op_error_inputs(name: str) -> None:
    op, ours = LOSSES.get(name), getattr(fastloss.functional, name)
    if op is None or op.error_inputs_func is None:
        pytest.skip(f"op_db has no error inputs for {name}")
    for case in op.error_inputs("cpu"):
        s = copy.deepcopy(case.sample_input)
        raises(case.error_type, lambda s=s: ours(s.input, *s.args, **s.kwargs), (s.input, s.args, s.kwargs))


def raises(error_type: type[Exception], f: Callable[[], Any], given: Any) -> str:
    """f raises, and leaves the tensors it was given alone. Returns the message."""
    before = [t.detach().clone() for t in tensors(given)]
    with pytest.raises(error_type) as error:
        f()
    for t, b in zip(tensors(given), before, strict=True):
        assert t.dtype == b.dtype and torch.equal(torch.nan_to_num(t), torch.nan_to_num(b)), "an input was written to"
    return str(error.value)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_module_error_inputs(name: str) -> None:
    info = next((m for m in module_db if m.name == f"nn.{name}"), None)
    if info is None:
        pytest.skip(f"this torch has no nn.{name}")
    cases = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    kinds = []
    for case in cases:
        made, f = case.module_error_input.constructor_input, case.module_error_input.forward_input
        kinds.append(case.error_on)
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            build = lambda made=made: getattr(fastloss.nn, name)(*made.args, **made.kwargs)  # noqa: E731
            raises(case.error_type, build, (made.args, made.kwargs))
        else:
            module = getattr(fastloss.nn, name)(*made.args, **made.kwargs)
            given = (f.args, f.kwargs, list(module.parameters()), list(module.buffers()))
            raises(case.error_type, lambda m=module, f=f: m(*f.args, **f.kwargs), given)
    assert kinds.count(ModuleErrorEnum.FORWARD_ERROR) >= 3


def test_error_messages_have_the_shapes() -> None:
    """What torch refuses, we refuse with the same type; and one sees what was given."""
    x, w, z, y = torch.randn(4, 5), torch.randn(7, 5), torch.randn(4, 7), torch.randint(0, 7, (4,))
    cross, linear = "cross_entropy", "linear_cross_entropy"
    bad: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = [
        (cross, (z, y[:3]), {}, ("(4, 7)", "(3,)")),
        (cross, (z, y.int()), {}, ("torch.int32", "(4, 7)")),
        (cross, (z, torch.rand(4, 6)), {}, ("(4, 7)", "(4, 6)")),
        (cross, (z, y, torch.ones(6)), {}, ("(4, 7)", "(6,)")),
        (cross, (z, y, torch.ones(7).double()), {}, ("(7,)", "torch.float64")),
        (cross, (z, y), {"label_smoothing": 1.5}, ("1.5", "(4, 7)")),
        (cross, (z.long(), y), {}, ("torch.int64", "(4, 7)")),
        (cross, (z, y), {"reduction": "average"}, ("average",)),
        (linear, (x, w[:, :4], y), {}, ("5", "4")),
        (linear, (x, w, y[:3]), {}, ("(4, 7)", "(3,)")),
        (linear, (x, w, y), {"linear_bias": torch.ones(6)}, ("(7,)", "(6,)")),
        (linear, (x, w, y), {"weight": torch.ones(6)}, ("(6,)", "(4, 7)")),
    ]
    for name, args, kwargs, parts in bad:
        theirs = getattr(torch.nn.functional, name, None)
        kind: type[Exception] = Exception
        if theirs is not None:
            with pytest.raises(Exception) as error:
                theirs(*args, **kwargs)
            kind = type(error.value)
        f = getattr(fastloss.functional, name)
        message = raises(kind, lambda f=f, args=args, kwargs=kwargs: f(*args, **kwargs), (args, kwargs))
        for part in parts:
            assert part in message, f"{name}{kwargs}: {message}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name: str, dtype: torch.dtype) -> None:
    info = next((m for m in module_db if m.name == f"nn.{name}"), None)
    if info is None:
        pytest.skip(f"this torch has no nn.{name}")
    count = 0
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    for sample in samples:
        a, k = sample.constructor_input.args, dict(sample.constructor_input.kwargs)
        if name == "LinearCrossEntropyLoss":
            k.update(dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(torch.nn, name)(*a, **k)
        ours = getattr(fastloss.nn, name)(*a, **k)
        ours.load_state_dict(theirs.state_dict())
        f = sample.forward_input

        class Case:
            input, args, kwargs = f.args[0], f.args[1:], f.kwargs

        compare(theirs, ours, Case, dtype, copy.deepcopy(theirs).double())
        count += 1
    assert count >= MODULES[name]


@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_other_losses_are_torchs_own(name: str) -> None:
    ours = getattr(fastloss.functional, name)
    assert ours is getattr(torch.nn.functional, name)
    if name in LOSSES:
        for sample in LOSSES[name].sample_inputs("cpu", torch.float32, requires_grad=True):
            compare(LOSSES[name], ours, sample, torch.float32)


@pytest.mark.parametrize("name", sorted({*fastloss.nn.__all__} - {*MODULES}))
def test_other_modules_are_torchs_own(name: str) -> None:
    if not hasattr(torch.nn, name):
        ours = getattr(fastloss.nn, name).__module__.startswith("fastloss")
        assert ours or name == "LinearCrossEntropyOptions", f"torch.nn has no {name}"
    else:
        assert getattr(fastloss.nn, name) is getattr(torch.nn, name)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A device mesh of this process alone."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if dist.is_initialized():
        pytest.skip("a process group is in use already")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
        assert not dist.is_initialized()


def test_dtensors_go_to_torch(one_rank: Any) -> None:
    """A DTensor knows how it is spread; kernels do not. Value and gradients are those of the whole tensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    x, w, y = torch.randn(6, 5), torch.randn(9, 5), torch.randint(0, 9, (6,))
    for placement in (Shard(0), Replicate()):
        whole = [t.clone().requires_grad_() for t in (x, w)]
        spread = [distribute_tensor(t, one_rank, [p]) for t, p in ((x, placement), (w, Replicate()))]
        spread = [t.requires_grad_() for t in spread]
        target = distribute_tensor(y, one_rank, [placement])
        want = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*whole), y)
        expected = torch.autograd.grad(want, whole)
        for f in (
            lambda x, w, y: fastloss.cross_entropy(torch.nn.functional.linear(x, w), y),
            fastloss.linear_cross_entropy,
        ):
            loss = f(*spread, target)
            assert isinstance(loss, DTensor)
            torch.testing.assert_close(loss.full_tensor(), want)
            for a, r in zip(torch.autograd.grad(loss, spread), expected, strict=True):
                assert isinstance(a, DTensor)
                torch.testing.assert_close(a.full_tensor(), r)
            with pytest.raises(ValueError, match="z_loss"):
                fastloss.linear_cross_entropy(*spread, target, z_loss=0.1)


def test_every_loss_name_of_torch_is_there() -> None:
    extra = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "kl_div")
    for name in dir(torch.nn.functional):
        if name.endswith("_loss") or name in extra:
            assert hasattr(fastloss.functional, name), name
    for name in dir(torch.nn):
        if "Loss" in name and isinstance(getattr(torch.nn, name), type):
            assert issubclass(getattr(fastloss.nn, name), torch.nn.Module), name


def test_swapping_the_import_is_safe() -> None:
    """What is no loss is torch's own; what torch does not have is an AttributeError."""
    assert fastloss.nn.Linear is torch.nn.Linear and fastloss.functional.relu is torch.nn.functional.relu
    for module in (fastloss.nn, fastloss.functional):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = module.no_such_name
