"""fastloss.compat.pytorch_metric_learning against pair-by-pair formulas and against the library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.pytorch_metric_learning import NTXentLoss, SupConLoss, ThresholdConsistentMarginLoss
from peers import check_same, embeddings, largest_saved
from tolerance import check_gradient

LOSSES = [NTXentLoss, SupConLoss, ThresholdConsistentMarginLoss]


def classes(labels, ref_labels=None):
    """(positive, negative) of all pairs."""
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)[None]
    if ref_labels is None:
        return same & ~torch.eye(len(labels), dtype=torch.bool), ~same
    return same, ~same


def ntxent(s, positive, negative, temperature=0.07):
    z = s / temperature
    losses = [
        -z[i, p] + torch.cat((z[i, p][None], z[i][negative[i]])).logsumexp(0) for i, p in positive.nonzero().tolist()
    ]
    return torch.stack(losses).mean() if losses and negative.any() else 0 * s.sum()


def supcon(s, positive, negative, temperature=0.1):
    z = s / temperature
    rows = [
        z[i][positive[i] | negative[i]].logsumexp(0) - z[i][positive[i]].mean()
        for i in range(len(z))
        if positive[i].any() and (positive[i].sum() > 1 or negative[i].any())
    ]
    return torch.stack(rows).mean() if rows and negative.any() else 0 * s.sum()


def tcm(s, positive, negative):
    near, far = (s - 0.5)[negative & (s >= 0.5)], (0.9 - s)[positive & (s <= 0.9)]
    return sum(x.mean() if len(x) else 0 * s.sum() for x in (near, far))


FORMULAS = dict(zip(LOSSES, (ntxent, supcon, tcm), strict=True))


def cosines(x, y=None):
    x = F.normalize(x, dim=1)
    return x @ (x if y is None else F.normalize(y, dim=1)).t()


LABELS = {
    "repeated": torch.tensor([4, 1, 4, 4, 0, 1, 2, 7, 7, 4, -3]),
    "pairs": torch.arange(6).repeat(2),
    "one class": torch.zeros(5, dtype=torch.long),
    "all different": torch.arange(5),
    "one row": torch.zeros(1, dtype=torch.long),
    "one row each of two classes": torch.tensor([0, 0, 1]),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LABELS)
def test_labels(loss, name):
    labels = LABELS[name]
    x = embeddings(len(labels), 3)
    check_same(lambda: loss()(x, labels), lambda: FORMULAS[loss](cosines(x), *classes(labels)), [x])


@pytest.mark.parametrize("loss", LOSSES)
def test_references(loss):
    x, y = embeddings(11, 3), embeddings(7, 3)
    labels, others = LABELS["repeated"], torch.tensor([4, 0, 9, 7, 4, 1, 1])
    check_same(
        lambda: loss()(x, labels, ref_emb=y, ref_labels=others),
        lambda: FORMULAS[loss](cosines(x, y), *classes(labels, others)),
        [x, y],
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("given", ["the tensor", "nothing"])
def test_references_that_are_the_rows(loss, given):
    x, y, labels = embeddings(11, 3), embeddings(11, 3), LABELS["repeated"]
    check_same(
        lambda: loss()(x, labels, ref_emb=y, ref_labels=labels if given == "the tensor" else None),
        lambda: FORMULAS[loss](cosines(x, y), *classes(labels)),
        [x, y],
    )


def test_temperatures_and_margins():
    x, labels = embeddings(11, 3), LABELS["repeated"]
    for loss in (NTXentLoss, SupConLoss):
        check_same(
            lambda: loss(0.6)(x, labels),  # noqa: B023
            lambda: FORMULAS[loss](cosines(x), *classes(labels), 0.6),  # noqa: B023
            [x],
        )
    pos, neg = classes(labels)

    def dense():
        s = cosines(x)
        return 2 * (0.4 - s)[pos & (s <= 0.4)].mean() + 3 * (s + 0.1)[neg & (s >= -0.1)].mean()

    check_same(lambda: ThresholdConsistentMarginLoss(2, 3, 0.4, -0.1)(x, labels), dense, [x])


def test_mined_pairs_and_their_repetitions():
    """NTXent and TCM count a pair as often as it is named, SupCon once."""
    x = embeddings(6, 3)
    pairs = tuple(torch.tensor(i) for i in ([0, 0, 2, 0], [1, 3, 4, 1], [0, 0, 2, 5, 0], [2, 4, 5, 1, 2]))
    a, p, b, n = pairs

    def dense_ntxent():
        z = cosines(x) / 0.07
        return torch.stack(
            [torch.cat((z[i, j][None], z[b, n][b == i])).logsumexp(0) - z[i, j] for i, j in zip(a, p, strict=True)]
        ).mean()

    def dense_tcm():
        pos, neg = cosines(x)[a, p], cosines(x)[b, n]
        return (0.9 - pos)[pos <= 0.9].mean() + ((neg - 0.1)[neg >= 0.1].mean() if (neg >= 0.1).any() else 0)

    positive, negative = (
        torch.zeros(6, 6, dtype=torch.bool).index_put(i, torch.tensor(True)) for i in ((a, p), (b, n))
    )
    check_same(lambda: NTXentLoss()(x, indices_tuple=pairs), dense_ntxent, [x])
    check_same(lambda: ThresholdConsistentMarginLoss(margin_minus=0.1)(x, None, pairs), dense_tcm, [x])
    negative[0, 1] = False  # row 0 with 1 cannot be both
    once = (a, p, b[torch.arange(5) != 3], n[torch.arange(5) != 3])
    negative = torch.zeros(6, 6, dtype=torch.bool).index_put(once[2:], torch.tensor(True))
    check_same(lambda: SupConLoss()(x, None, once), lambda: supcon(cosines(x), positive, negative), [x])


@pytest.mark.parametrize("loss", LOSSES)
def test_mined_triplets_of_references(loss):
    x, y = embeddings(5, 3), embeddings(4, 3)
    anchors, positives, negatives = torch.tensor([0, 3, 4]), torch.tensor([2, 0, 1]), torch.tensor([1, 1, 3])
    positive, negative = (
        torch.zeros(5, 4, dtype=torch.bool).index_put((anchors, i), torch.tensor(True)) for i in (positives, negatives)
    )
    check_same(
        lambda: loss()(x, None, (anchors, positives, negatives), y),
        lambda: FORMULAS[loss](cosines(x, y), positive, negative),
        [x, y],
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_one_triplet_has_a_loss(loss):
    """The library returns 0 where no list holds two entries."""
    x, triplet = embeddings(3, 3), tuple(torch.tensor([i]) for i in range(3))
    positive, negative = (
        torch.zeros(3, 3, dtype=torch.bool).index_put(i, torch.tensor(True)) for i in (triplet[:2], triplet[::2])
    )
    check_same(lambda: loss()(x, None, triplet), lambda: FORMULAS[loss](cosines(x), positive, negative), [x])


@pytest.mark.parametrize("loss", LOSSES)
def test_no_pairs(loss):
    x, nothing = embeddings(5, 3), torch.tensor([])
    for value in (loss()(x, None, (nothing,) * 4), loss()(x, torch.arange(5), (nothing.long(),) * 3)):
        assert value == 0
        assert torch.autograd.grad(value, x)[0].eq(0).all()


def test_a_small_loss_keeps_its_digits():
    """Positives at similarity 1, negatives at -1: e^(-2 / 0.07) is far below the rounding of 1 in float32."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    right = NTXentLoss()(x.double(), labels)
    assert 0 < right < 1e-11
    torch.testing.assert_close(NTXentLoss()(x, labels).double(), right, rtol=1e-4, atol=0)
    right = SupConLoss(0.07)(x.double(), labels)
    torch.testing.assert_close(SupConLoss(0.07)(x, labels).double(), right, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(loss, dtype):
    x, labels = torch.randn(24, 12).to(dtype), torch.randint(0, 6, (24,))
    ours = loss(**({} if loss is ThresholdConsistentMarginLoss else {"temperature": 0.5}))
    options = () if loss is ThresholdConsistentMarginLoss else (0.5,)

    def gradient(f, kind):
        leaf = x.to(kind).requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    def dense(leaf):
        return FORMULAS[loss](cosines(leaf), *classes(labels), *options)

    check_gradient(
        gradient(lambda leaf: ours(leaf, labels), dtype), gradient(dense, dtype), gradient(dense, torch.float64), dtype
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_no_matrix_is_kept(loss):
    x, labels = embeddings(300, 8), torch.randint(0, 20, (300,))
    assert largest_saved(lambda: loss()(x, labels)) <= 300 * 9


def test_errors():
    x, labels = torch.randn(4, 3), torch.arange(4)
    for loss in LOSSES:
        with pytest.raises(ValueError, match="cannot both be None"):
            loss()(x)
        with pytest.raises(ValueError, match=r"labels must have shape \[4\]"):
            loss()(x, labels[:3])
        with pytest.raises(ValueError, match=r"ref_labels must have shape \[2\]"):
            loss()(x, labels, ref_emb=x[:2], ref_labels=labels[:3])
        with pytest.raises(ValueError, match="tensors, got 2"):
            loss()(x, labels, (labels, labels))
        with pytest.raises(TypeError, match="integer tensors"):
            loss()(x, labels, (x[0],) * 3)
        with pytest.raises(IndexError, match=r"must be in \[0, 4\)"):
            loss()(x, labels, (labels, labels + 1, labels))
        with pytest.raises(TypeError, match="ids must be integers"):
            loss()(x, labels.float())
        with pytest.raises(TypeError, match="distance must be None"):
            loss(distance=torch.nn.CosineSimilarity())
        with pytest.raises(TypeError, match="reducer"):
            loss(reducer="mean")
        with pytest.raises(TypeError, match="embedding_regularizer must be None"):
            loss(embedding_regularizer=torch.nn.Identity())
    with pytest.raises(TypeError, match="MeanReducer, SumReducer, AvgNonZeroReducer"):
        NTXentLoss(reducer=torch.nn.Identity())
    with pytest.raises(ValueError, match="positive and as negative"):
        SupConLoss()(x, labels, (labels, labels, labels, labels))
    with pytest.raises(ValueError, match="must be finite and > 0"):
        NTXentLoss(-1.0)(x, labels)


@pytest.fixture
def library():
    package = pytest.importorskip("pytorch_metric_learning")
    for part in ("losses", "reducers", "distances", "miners"):
        pytest.importorskip(f"pytorch_metric_learning.{part}", exc_type=ImportError)
    return package


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LABELS)
def test_library_labels(library, loss, name):
    theirs = getattr(library.losses, loss.__name__)
    labels = LABELS[name]
    x = embeddings(len(labels), 3)
    check_same(lambda: loss()(x, labels), lambda: theirs()(x, labels), [x])


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("tensor", [True, False])
def test_library_references(library, loss, tensor):
    theirs = getattr(library.losses, loss.__name__)
    x, y, labels = embeddings(11, 3), embeddings(11, 3), LABELS["repeated"]
    others = labels if tensor else labels.roll(3)
    options = {"ref_emb": y, "ref_labels": others}
    check_same(lambda: loss()(x, labels, **options), lambda: theirs()(x, labels, **options), [x, y])


@pytest.mark.parametrize("loss", LOSSES)
def test_library_miner(library, loss):
    theirs = getattr(library.losses, loss.__name__)
    labels = torch.randint(0, 4, (20,))
    x = embeddings(20, 3)
    for miner in (library.miners.MultiSimilarityMiner(), library.miners.TripletMarginMiner(type_of_triplets="all")):
        pairs = miner(x.detach(), labels)
        check_same(lambda: loss()(x, labels, pairs), lambda: theirs()(x, labels, pairs), [x])  # noqa: B023


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer", "AvgNonZeroReducer"])
def test_library_reducers(library, loss, reducer):
    theirs, made = getattr(library.losses, loss.__name__), getattr(library.reducers, reducer)()
    labels = LABELS["repeated"]
    x = embeddings(len(labels), 3)
    check_same(lambda: loss(reducer=made)(x, labels), lambda: theirs(reducer=made)(x, labels), [x])


def test_library_rows_without_negatives(library):
    """Their pairs have a loss of 0: the mean counts them, AvgNonZeroReducer does not."""
    x, y = embeddings(3, 3), embeddings(4, 3)
    given = (x, torch.tensor([0, 0, 1]), None, y, torch.tensor([0, 0, 0, 0]))
    indices = tuple(torch.tensor(i) for i in ([0, 0, 1, 2], [0, 1, 2, 3], [1, 1, 2], [0, 3, 0]))
    for pairs in (None, indices):
        for reducer in (None, library.reducers.AvgNonZeroReducer()):
            arguments = (*given[:2], pairs, *given[3:])
            check_same(
                lambda: NTXentLoss(reducer=reducer)(*arguments),  # noqa: B023
                lambda: library.losses.NTXentLoss(reducer=reducer)(*arguments),  # noqa: B023
                [x, y],
            )


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
def test_library_distances(library, loss):
    theirs, distances = getattr(library.losses, loss.__name__), library.distances
    x, labels = embeddings(11, 3), LABELS["repeated"]
    for distance in (
        distances.CosineSimilarity(), distances.DotProductSimilarity(),
        distances.DotProductSimilarity(normalize_embeddings=False), distances.LpDistance(power=2),
    ):  # fmt: skip
        check_same(
            lambda: loss(0.5, distance=distance)(x, labels),  # noqa: B023
            lambda: theirs(0.5, distance=distance)(x, labels),  # noqa: B023
            [x],
            rtol=1e-7 if isinstance(distance, distances.LpDistance) else 1e-9,  # theirs squares a root
        )

    class Own(distances.CosineSimilarity):
        pass

    for refused in (
        Own(), distances.LpDistance(), distances.LpDistance(power=2, normalize_embeddings=False), distances.SNRDistance(),
        distances.CosineSimilarity(p=1), distances.CosineSimilarity(power=3),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="distance must be None"):
            loss(distance=refused)


def test_library_wrappers(library):
    """SelfSupervisedLoss and CrossBatchMemory take ours by its name and its call."""
    x, y = embeddings(6, 4), embeddings(6, 4)
    ours, theirs = (library.losses.SelfSupervisedLoss(made(0.3)) for made in (NTXentLoss, library.losses.NTXentLoss))
    check_same(lambda: ours(x, y), lambda: theirs(x, y), [x, y])
    memories = [
        library.losses.CrossBatchMemory(m(0.3), 4, memory_size=10) for m in (SupConLoss, library.losses.SupConLoss)
    ]
    for _ in range(4):
        z, labels = embeddings(6, 4, dtype=torch.float32), torch.randint(0, 3, (6,))
        check_same(lambda: memories[0](z, labels), lambda: memories[1](z, labels), [z], rtol=3e-5)  # noqa: B023
