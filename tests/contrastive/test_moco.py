"""moco_loss against the dense formula, and the ring of its queue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_checks import agree, agree_in, cosines, leaves
from fastloss.contrastive import MoCoLoss, Queue, moco_loss


def dense(q, k, queue, temperature=0.07, labels=None, queue_labels=None, same_label="positive"):
    own = cosines(q, k.detach()).diagonal()[:, None]
    z = torch.cat((own, cosines(q, queue)), 1) / temperature
    if labels is None:
        return -F.log_softmax(z, 1)[:, 0]
    same = labels[:, None] == queue_labels[None]
    if same_label == "exclude":
        return -F.log_softmax(torch.cat((z[:, :1], z[:, 1:].masked_fill(same, float("-inf"))), 1), 1)[:, 0]
    positive = torch.cat((torch.ones(len(q), 1, dtype=torch.bool), same), 1)
    return -(F.log_softmax(z, 1) * positive).sum(1) / positive.sum(1)


@pytest.mark.parametrize("filled", [1, 5, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
def test_value_and_gradient(filled, temperature):
    q, k, queue = leaves((6, 8), (6, 8), (12, 8))
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    right = dense(q, k, queue[:filled].detach(), tau)
    with torch.no_grad():
        queue[filled:] = float("inf")
    ours = moco_loss(q, k, queue, tau, queue_valid=torch.arange(12) < filled, reduction="none")
    agree(ours, right, (q, tau))
    assert torch.autograd.grad(ours.sum(), (k, queue), allow_unused=True) == (None, None)


@pytest.mark.parametrize("same_label", ["positive", "exclude"])
def test_labels(same_label):
    q, k, queue = leaves((6, 8), (6, 8), (12, 8))
    labels, theirs = torch.randint(0, 3, (6,)), torch.randint(0, 4, (12,))
    theirs[theirs == labels[2]] = 9  # a row with no positive in the queue
    ours = moco_loss(q, k, queue, labels=labels, queue_labels=theirs, same_label=same_label, reduction="none")
    agree(ours, dense(q, k, queue.detach(), 0.07, labels, theirs, same_label), (q,))


def test_empty_queue_is_no_loss():
    q, k, queue = leaves((3, 4), (3, 4), (5, 4))
    for given in ({}, {"labels": torch.arange(3), "queue_labels": torch.arange(5)}):
        loss = moco_loss(q, k, queue, queue_valid=torch.zeros(5, dtype=torch.bool), **given)
        assert loss == 0 and torch.autograd.grad(loss, q)[0].abs().max() == 0


def test_low_precision():
    q, k, queue = leaves((16, 16), (16, 16), (40, 16))
    for dtype in (torch.float32, torch.bfloat16):
        fixed = (k.detach().to(dtype), queue.detach().to(dtype))

        def ours(x, fixed=fixed):
            return moco_loss(x, *(t.to(x.dtype) for t in fixed), 0.2)

        agree_in(dtype, ours, lambda x, f=fixed: dense(x, *(t.to(x.dtype) for t in f), 0.2).mean(), (q,))


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 10, 11, 23])
def test_the_ring(batch):
    """The last `size` vectors, at the places of a ring, also where the batch does not divide the size or is larger."""
    queue = Queue(10, 2, labels=True, normalize=False)
    expected, position, count = torch.zeros(10), 0, 0
    for step in range(6):
        x = torch.arange(step * batch + 1, (step + 1) * batch + 1, dtype=torch.float32)
        queue.enqueue(x[:, None].expand(-1, 2), x.long())
        for value in x:
            expected[position % 10] = value
            position += 1
        count = min(10, count + batch)
        assert torch.equal(queue.vectors, expected[:, None].expand(-1, 2))
        assert torch.equal(queue.labels[queue.valid], expected[queue.valid].long())
        assert int(queue.position) == position % 10 and int(queue.valid.sum()) == count
        assert queue.valid.tolist() == [i < count for i in range(10)]


def test_state_dict_goes_on_where_it_was():
    one, other = Queue(7, 3, labels=True), Queue(7, 3, labels=True)
    for _ in range(3):
        one.enqueue(torch.randn(4, 3), torch.randint(0, 9, (4,)))
    other.load_state_dict(one.state_dict())
    x, labels = torch.randn(4, 3), torch.arange(4)
    one.enqueue(x, labels)
    other.enqueue(x, labels)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    torch.testing.assert_close(one.vectors.norm(dim=1), torch.ones(7))


def test_module_enqueues_after_the_query():
    criterion, kept = MoCoLoss(8, size=10, temperature=0.1), []
    losses, queries = [], []
    for step in range(4):
        q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
        losses.append(criterion(q, k))
        queries.append(q)
        if step:
            past = torch.cat(kept)
            ring = torch.empty(min(10, len(past)), 8)
            for i, x in enumerate(past):
                ring[i % 10] = x
            torch.testing.assert_close(losses[-1], dense(q, k, ring, 0.1).mean())
        else:
            assert losses[-1] == 0
        kept.append(k)
    for loss, q in zip(losses, queries, strict=True):  # backward may come after later calls
        loss.backward()
        assert q.grad is not None and q.grad.isfinite().all()


def test_module_with_labels():
    criterion = MoCoLoss(8, size=10, labels=True)
    for _ in range(3):
        q, k, labels = torch.randn(4, 8), torch.randn(4, 8), torch.randint(0, 3, (4,))
        before = [t.clone() for t in (criterion.queue.vectors, criterion.queue.labels, criterion.queue.valid)]
        loss = criterion(q, k, labels)
        right = moco_loss(q, k, before[0], labels=labels, queue_labels=before[1], queue_valid=before[2])
        assert torch.equal(loss, right)


def test_enqueue_never_looks_at_a_number():
    """No graph break: nothing on the way to the queue asks the device for a number."""
    queue = Queue(10, 4)
    step = torch.compile(lambda x: queue.enqueue(x), fullgraph=True, backend="eager")
    for _ in range(4):
        step(torch.randn(3, 4))
    assert int(queue.position) == 2 and int(queue.filled) == 10


def test_bad_input():
    q, queue = torch.randn(3, 4), torch.randn(5, 4)
    for call, message in (
        (lambda: moco_loss(q, q[:2], queue), "one shape"),
        (lambda: moco_loss(q, q, queue, 0.0), "temperature must be"),
        (lambda: moco_loss(q, q, queue[:, :2]), "one dimension D"),
        (lambda: moco_loss(q, q, queue, queue_valid=torch.ones(4, dtype=torch.bool)), "column_valid"),
        (lambda: moco_loss(q, q, queue, labels=torch.arange(3)), "come together"),
        (lambda: moco_loss(q, q, queue, labels=torch.arange(2), queue_labels=torch.arange(5)), "ids must have shape"),
        (lambda: moco_loss(q, q, queue, same_label="keep"), "same_label"),
        (lambda: Queue(0, 4), "size must be"),
        (lambda: Queue(4, 4).enqueue(torch.randn(2, 3)), "expected vectors"),
        (lambda: Queue(4, 4).enqueue(q, torch.arange(3)), "labels=False"),
        (lambda: Queue(4, 4, labels=True).enqueue(q), "labels=True"),
        (lambda: Queue(4, 4, labels=True).enqueue(q, torch.arange(2)), "labels must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
