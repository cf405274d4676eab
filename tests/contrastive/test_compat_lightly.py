"""fastloss.compat.lightly against the dense formulas and against lightly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.lightly import DCLLoss, DCLWLoss, NTXentLoss, negative_mises_fisher_weights
from peers import check_same, embeddings, largest_saved, module_of
from tolerance import check_gradient

STAND_INS = {"lightly.models.utils": {"concat_all_gather": None}}


def cosines(out0, out1, temperature):
    rows = F.normalize(torch.cat((out0, out1)), dim=1)
    return rows @ rows.t() / temperature


def partner(batch):
    return torch.cat((torch.arange(batch, 2 * batch), torch.arange(batch)))


def dense_ntxent(out0, out1, temperature=0.5):
    z = cosines(out0, out1, temperature)
    z = z.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(z, partner(len(out0)))


def dense_dcl(out0, out1, temperature=0.1, weights=None):
    z, other = cosines(out0, out1, temperature), partner(len(out0))
    own = z.gather(1, other[:, None])[:, 0]
    dropped = torch.eye(len(z), dtype=torch.bool).scatter(1, other[:, None], True)
    negative = z.masked_fill(dropped, -torch.inf).logsumexp(1)
    return (negative - (1 if weights is None else weights) * own).mean()


def mises_fisher(out0, out1, sigma):
    similarity = F.cosine_similarity(out0, out1).detach() / sigma
    return (2 - len(out0) * similarity.softmax(0)).repeat(2)


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_ntxent(batch, temperature):
    x = [embeddings(batch, 12), embeddings(batch, 12)]
    check_same(lambda: NTXentLoss(temperature)(*x), lambda: dense_ntxent(*x, temperature), x)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_dcl(temperature):
    x = [embeddings(21, 12), embeddings(21, 12)]
    check_same(lambda: DCLLoss(temperature)(*x), lambda: dense_dcl(*x, temperature), x)
    check_same(
        lambda: DCLWLoss(temperature, sigma=0.3)(*x),
        lambda: dense_dcl(*x, temperature, mises_fisher(*x, 0.3)),
        x,
    )


def test_weights_of_the_users_own():
    x = [embeddings(9, 5), embeddings(9, 5)]

    def weight(a, b):
        return (a - b).square().sum(1) + a[:, 0]

    def dense():
        a, b = (F.normalize(t, dim=1) for t in x)
        return dense_dcl(*x, 0.1, torch.cat((weight(a, b), weight(b, a))))

    check_same(lambda: DCLLoss(weight_fn=weight)(*x), dense, x)


def test_one_sample_has_no_negatives():
    x = [embeddings(1, 4), embeddings(1, 4)]
    loss = DCLLoss()(*x)
    assert loss == -torch.inf
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, x))


def queue_loss(out0, out1, queue, temperature):
    a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    z = torch.cat(((a * b).sum(1, keepdim=True), a @ queue.to(a.dtype).t()), 1) / temperature
    return F.cross_entropy(z, torch.zeros(len(a), dtype=torch.long))


@pytest.mark.parametrize("rows", [7, 12, 16])
def test_memory_bank_over_steps(rows):
    loss = NTXentLoss(0.2, memory_bank_size=(rows, 6))
    queue, place = loss.memory_bank.bank.clone(), 0
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(rows))
    for _ in range(7):  # several rounds through the queue, whose end cuts a batch of 4 off
        x = [embeddings(4, 6), embeddings(4, 6)]
        before = queue.clone()
        check_same(lambda: loss(*x), lambda: queue_loss(*x, before, 0.2), [x[0]])  # noqa: B023
        added = F.normalize(x[1].detach(), dim=1).float()[: rows - place]
        queue[place : place + 4] = added
        place = 0 if place + 4 >= rows else place + 4
        torch.testing.assert_close(loss.memory_bank.bank, queue)


def test_gradient_of_the_positive_with_a_bank():
    loss, x = NTXentLoss(0.2, memory_bank_size=(9, 6)), [embeddings(4, 6), embeddings(4, 6)]
    queue = loss.memory_bank.bank.clone()
    check_same(lambda: loss(*x), lambda: queue_loss(*x, queue, 0.2), x)


def test_bank_stays_without_gradients():
    loss = NTXentLoss(memory_bank_size=(9, 6))
    queue = loss.memory_bank.bank.clone()
    with torch.no_grad():
        loss(torch.randn(4, 6), torch.randn(4, 6))
    assert loss.memory_bank.bank.equal(queue)
    assert not loss.state_dict()  # as in lightly


@pytest.mark.parametrize("size", [0, (0, 6), (7, 6), (8, 6), (3, 6)])
def test_library_ntxent(size):
    """lightly keeps its bank in float32, and works in that alone."""
    dtype = torch.float64 if size in (0, (0, 6)) else torch.float32
    theirs = module_of("lightly.loss.ntx_ent_loss", STAND_INS).NTXentLoss
    torch.manual_seed(1)
    ours = NTXentLoss(memory_bank_size=size)
    torch.manual_seed(1)
    right = theirs(memory_bank_size=size)
    assert ours.temperature == right.temperature
    torch.testing.assert_close(ours.memory_bank.bank.flatten(), right.memory_bank.bank.flatten())
    for _ in range(5):
        x = [embeddings(4, 6, dtype=dtype), embeddings(4, 6, dtype=dtype)]
        check_same(lambda: ours(*x), lambda: right(*x), x, rtol=1e-9 if dtype == torch.float64 else 2e-5)  # noqa: B023
        torch.testing.assert_close(ours.memory_bank.bank.flatten(), right.memory_bank.bank.flatten())


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_library_dcl():
    theirs = module_of("lightly.loss.dcl_loss", STAND_INS)
    x = [embeddings(13, 6), embeddings(13, 6)]
    check_same(lambda: DCLLoss()(*x), lambda: theirs.DCLLoss()(*x), x)
    check_same(lambda: DCLWLoss()(*x), lambda: theirs.DCLWLoss()(*x), x)
    check_same(lambda: DCLWLoss(0.4, 0.7)(*x), lambda: theirs.DCLWLoss(0.4, 0.7)(*x), x)
    weights = negative_mises_fisher_weights(*x, sigma=0.2)
    torch.testing.assert_close(weights, theirs.negative_mises_fisher_weights(*x, sigma=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    x = [torch.randn(20, 12).to(dtype) for _ in range(2)]

    def gradients(f, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in x]
        return torch.autograd.grad(f(*leaves), leaves)

    for ours, torchs, right in zip(
        gradients(NTXentLoss(), dtype),
        gradients(dense_ntxent, dtype),
        gradients(dense_ntxent, torch.float64),
        strict=True,
    ):
        check_gradient(ours, torchs, right, dtype)


@pytest.mark.parametrize("loss", [NTXentLoss(), DCLLoss(), DCLWLoss(), NTXentLoss(memory_bank_size=(300, 8))])
def test_no_matrix_is_kept(loss):
    x = [embeddings(200, 8), embeddings(200, 8)]
    assert largest_saved(lambda: loss(*x)) <= 400 * 9


def test_errors():
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            NTXentLoss(temperature)
    for size in (5, -1, (3, -2), (1, 2, 3), (4,)):
        with pytest.raises(ValueError, match="memory_bank_size"):
            NTXentLoss(memory_bank_size=size)
    for loss in (NTXentLoss(), DCLLoss()):
        with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
            loss(torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="one dimension D"):
        NTXentLoss(memory_bank_size=(9, 6))(torch.randn(3, 4), torch.randn(3, 4))
