"""SogCLR and iSogCLR: losses, gradients and states over several steps against the published updates, written densely."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_checks import agree, cosines, leaves
from fastloss.contrastive import ISogCLRLoss, SogCLRLoss
from fastloss.pairs import arguments, classes


class Published:
    """The updates as the papers and LibAUC write them: u and tau of each sample, a dense matrix, shifted by nothing."""

    def __init__(self, n, modality, tau, gamma, rho=0.0, eta=0.0, beta=0.9, low=0.0, high=9.0, clip=None):
        sides = 1 if modality == "unimodal" else 2
        self.modality, self.gamma, self.rho, self.eta, self.beta = modality, gamma, rho, eta, beta
        self.low, self.high, self.clip = low, high, clip
        self.u, self.momentum = (torch.zeros(sides, n, dtype=torch.float64) for _ in range(2))
        self.tau = torch.full((sides, n), tau, dtype=torch.float64)

    def __call__(self, q, k, index):
        """(objective, estimate whose gradient is the published one)"""
        b = len(q)
        s = cosines(q, k)
        eye = torch.eye(b, dtype=torch.bool)
        if self.modality == "unimodal":
            same = [cosines(x, x).masked_select(~eye).view(b, b - 1) for x in (q, k)]
            other = [x.masked_select(~eye).view(b, b - 1) for x in (s, s.t())]
            h = [torch.cat(pair, 1) for pair in zip(other, same, strict=True)]
        else:
            h = [(x - x.diagonal()[:, None]).masked_select(~eye).view(b, b - 1) for x in (s, s.t())]
        values, estimates, gradients, means = [], [], [], []
        for side, x in enumerate(h):
            state = side if self.modality == "bimodal" else 0
            tau, u = self.tau[state, index], self.u[state, index]
            e = (x.detach() / tau[:, None]).exp()
            u = torch.where(u == 0, e.mean(1), (1 - self.gamma) * u + self.gamma * e.mean(1))
            weight = e / u[:, None]
            means.append(u)
            gradients.append(u.log() + self.rho - (weight * x.detach() / tau[:, None]).mean(1))
            pull = s.diagonal() if self.modality == "unimodal" else torch.zeros(b, dtype=s.dtype)
            values.append(tau * (u.log() + self.rho) - pull.detach())
            estimates.append((weight * x).mean(1) - pull)
        if self.modality == "unimodal":
            means, gradients = [(means[0] + means[1]) / 2], [(gradients[0] + gradients[1]) / 2]
        for state, (u, g) in enumerate(zip(means, gradients, strict=True)):
            self.u[state, index] = u
            g = g if self.clip is None else g.clamp(-self.clip, self.clip)
            self.momentum[state, index] = (1 - self.beta) * self.momentum[state, index] + self.beta * g
            moved = self.tau[state, index] - self.eta * self.momentum[state, index]
            self.tau[state, index] = moved.clamp(self.low, self.high)
        return torch.cat(values), torch.cat(estimates)


def steps(criterion, published, batches=5, n=20, b=6):
    for _ in range(batches):
        q, k = leaves((b, 8), (b, 8))
        index = torch.randperm(n)[:b]
        loss = criterion(q, k, index)
        value, estimate = published(q, k, index)
        agree(loss, value.detach() + (estimate - estimate.detach()), (q, k))
        seen = published.u > 0
        torch.testing.assert_close(criterion.log_u[seen], published.u[seen].log(), rtol=1e-10, atol=1e-10)
        assert (criterion.log_u[~seen] == -torch.inf).all()


@pytest.mark.parametrize("modality", ["unimodal", "bimodal"])
@pytest.mark.parametrize("gamma", [0.9, 0.3, 1.0])
def test_sogclr(modality, gamma):
    criterion = SogCLRLoss(20, 0.2, modality=modality, gamma=gamma, reduction="none", dtype=torch.float64)
    steps(criterion, Published(20, modality, 0.2, gamma))


@pytest.mark.parametrize("modality", ["unimodal", "bimodal"])
def test_isogclr_with_libauc_defaults(modality):
    criterion = ISogCLRLoss(20, modality=modality, reduction="none", dtype=torch.float64)
    options = (
        (0.1, 0.9, 0.3, 0.01, 0.9, 0.05, 0.7) if modality == "unimodal" else (0.01, 0.9, 6.0, 0.01, 0.9, 0.005, 0.05)
    )
    published = Published(20, modality, *options)
    steps(criterion, published)
    torch.testing.assert_close(criterion.tau, published.tau, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(criterion.tau_gradient, published.momentum, rtol=1e-9, atol=1e-10)
    assert (criterion.tau != options[0]).any()


@pytest.mark.parametrize("modality", ["unimodal", "bimodal"])
def test_isogclr_with_the_authors_defaults(modality):
    criterion = ISogCLRLoss.authors(20, modality, eta=0.002).double()
    criterion.reduction = "none"
    rho, tau, high, clip = (6.0, 0.1, 1.0, 3.0) if modality == "unimodal" else (8.0, 0.01, 0.05, 5.0)
    published = Published(20, modality, tau, 0.8, rho, 0.002, 0.9, 0.05 if tau == 0.1 else 0.005, high, clip)
    published.tau[:] = criterion.tau  # 0.1 in float32
    steps(criterion, published)
    torch.testing.assert_close(criterion.tau, published.tau, rtol=1e-7, atol=1e-10)


def test_estimate_is_the_gradient_of_the_objective_at_gamma_one():
    q, k = leaves((6, 8), (6, 8))
    z = cosines(q, k) / 0.2
    eye = torch.eye(6, dtype=torch.bool)
    rows, columns = (torch.logsumexp(x.masked_fill(eye, -torch.inf), 1) - x.diagonal() for x in (z, z.t()))
    right = 0.2 * ((rows + columns).mean() / 2 - torch.log(torch.tensor(5.0, dtype=torch.float64)))
    criterion = SogCLRLoss(6, 0.2, modality="bimodal", gamma=1.0, dtype=torch.float64)
    agree(criterion(q, k, torch.arange(6)), right, (q, k))


def test_low_temperatures_do_not_overflow():
    """e^(h / tau) of float32 overflows at h / tau > 88; log u does not."""
    criterion = SogCLRLoss(8, 0.005, modality="bimodal")
    q, k = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    for _ in range(3):
        loss = criterion(q, k, torch.arange(8))
        grads = torch.autograd.grad(loss, (q, k))
    assert float(criterion.log_u.max()) > 88
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


class NoHostSync(TorchDispatchMode):
    """Raises where a tensor's number is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modality", ["unimodal", "bimodal"])
@pytest.mark.parametrize("kind", [SogCLRLoss, ISogCLRLoss])
def test_no_step_waits_for_the_host(kind, modality, monkeypatch):
    """Forward and backward of four steps, arguments not looked at (they are on a CPU alone), ask for no number."""
    for module in (arguments, classes):
        monkeypatch.setattr(module, "can_look", lambda x: False)
    criterion = kind(20, modality=modality)
    with NoHostSync():
        for _ in range(4):
            q, k = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
            criterion(q, k, torch.randperm(20)[:6]).backward()
        with pytest.raises(AssertionError, match="waits for the device"):
            criterion.log_u.max().item()


@pytest.mark.parametrize("modality", ["unimodal", "bimodal"])
@pytest.mark.parametrize("kind", [SogCLRLoss, ISogCLRLoss])
def test_compiles_into_one_graph(kind, modality):
    criterion, twin = kind(20, modality=modality), kind(20, modality=modality)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for _ in range(3):
        q, k = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
        index = torch.randperm(20)[:6]
        losses = compiled(q, k, index), twin(q, k, index)
        torch.testing.assert_close(*losses)
        for a, b in zip(*(torch.autograd.grad(loss, (q, k)) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
    for name, value in criterion.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_evaluation_changes_no_state():
    criterion = ISogCLRLoss(20)
    q, k, index = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6)
    criterion(q, k, index)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.eval()(q, k, index)
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    other = ISogCLRLoss(20)
    other.load_state_dict(before)
    assert torch.equal(other.tau, criterion.tau)


def test_bad_input():
    q, index = torch.randn(4, 8), torch.arange(4)
    for call, message in (
        (lambda: SogCLRLoss(0), "num_samples must be"),
        (lambda: SogCLRLoss(9, 0.0), "temperature must be"),
        (lambda: SogCLRLoss(9, gamma=0.0), "gamma must be"),
        (lambda: SogCLRLoss(9, modality="audio"), "modality must be"),
        (lambda: ISogCLRLoss(9, tau_min=-1.0), "tau_min"),
        (lambda: ISogCLRLoss(9, beta=2.0), "beta must be"),
        (lambda: ISogCLRLoss(9, eta=-1.0), "eta must be"),
        (lambda: ISogCLRLoss(9, grad_clip=0.0), "grad_clip must be"),
        (lambda: SogCLRLoss(9)(q, q[:2], index), "one shape"),
        (lambda: SogCLRLoss(9)(q[:1], q[:1], index[:1]), "two samples"),
        (lambda: SogCLRLoss(9)(q, q, index[:2]), "index must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="index must be"):
        SogCLRLoss(9)(q, q, index.float())
    with pytest.raises(IndexError):
        SogCLRLoss(9)(q, q, index + 6)
