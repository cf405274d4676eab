"""MultipleNegativesRankingLoss of fastloss.compat.sentence_transformers against a row-by-row formula and against the
library."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.sentence_transformers import MultipleNegativesRankingLoss
from peers import check_same, embeddings, largest_saved, module_of
from tolerance import check_gradient

JOINT = [
    ("query_to_doc", *others)
    for count in range(4)
    for others in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), count)
]
PARTITIONS = [(d, "joint") for d in JOINT] + [
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def cos_sim(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()


def dot_score(a, b):
    return a @ b.t()


def formula(
    tensors, scale=20.0, similarity_fct=cos_sim, directions=("query_to_doc",), partition_mode="joint", hardness_mode=None,
    hardness_strength=0.0,
):  # fmt: skip
    """Row by row, each candidate by name."""
    query, docs = tensors[0], tensors[1:]
    to_query, rows = similarity_fct(query, query), range(len(query))
    to_docs = [similarity_fct(query, doc) for doc in docs]
    among_docs = [similarity_fct(docs[0], doc) for doc in docs]
    total = 0.0
    for i in rows:
        logits = {name: [] for name in directions}
        for j, (number, matrix) in itertools.product(rows, enumerate(to_docs)):
            hard, elsewhere = j == i and number > 0, j != i
            penalised = {
                None: False, "in_batch_negatives": elsewhere, "hard_negatives": hard, "all_negatives": hard or elsewhere,
            }[hardness_mode]  # fmt: skip
            z = scale * matrix[i, j] + (hardness_strength * matrix[i, j].detach() if penalised else 0)
            logits["query_to_doc"].append(z)
        if "query_to_query" in directions:
            logits["query_to_query"] += [scale * to_query[i, j] for j in rows if j != i]
        if "doc_to_query" in directions:
            logits["doc_to_query"] += [scale * to_docs[0][j, i] for j in rows]
        if "doc_to_doc" in directions:
            logits["doc_to_doc"] += [scale * m[i, j] for m in among_docs for j in rows if j != i]
        own = scale * to_docs[0][i, i]
        if partition_mode == "joint":
            total = total + torch.stack(list(itertools.chain(*logits.values()))).logsumexp(0) - own
        else:
            total = total + sum(torch.stack(z).logsumexp(0) - own for z in logits.values()) / len(logits)
    return total / len(query)


def library():
    util = {
        "cos_sim": cos_sim, "get_rank": lambda: 0, "all_gather_with_grad": lambda x: x,
        "similarity_fct_name": lambda f: f.__name__,
    }  # fmt: skip
    stand_ins = {
        "sentence_transformers.util": util,
        "sentence_transformers.base.losses.merged_forward": {
            "embed_columns": lambda model, features: [model(f)["sentence_embedding"] for f in features]
        },
        "sentence_transformers.sentence_transformer.model": {"SentenceTransformer": object},
    }
    name = "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking"
    return module_of(name, stand_ins).MultipleNegativesRankingLoss


def problem(columns, batch=7, dim=5, dtype=torch.float64):
    return [embeddings(batch, dim, dtype=dtype) for _ in range(columns)]


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("directions, partition", PARTITIONS)
def test_directions(directions, partition, columns):
    x = problem(columns)
    loss = MultipleNegativesRankingLoss(scale=7.0, directions=directions, partition_mode=partition)
    options = {"scale": 7.0, "directions": directions, "partition_mode": partition}
    check_same(lambda: loss.compute_loss_from_embeddings(x, None), lambda: formula(x, **options), x)


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("directions, partition", [PARTITIONS[0], PARTITIONS[7], PARTITIONS[-1]])
def test_hardness(directions, partition, mode, columns):
    x = problem(columns)
    options = {
        "directions": directions, "partition_mode": partition, "hardness_mode": mode, "hardness_strength": 5.0, "scale": 9.0,
    }  # fmt: skip
    loss = MultipleNegativesRankingLoss(**options)
    check_same(lambda: loss.compute_loss_from_embeddings(x, None), lambda: formula(x, **options), x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("directions", [JOINT[0], JOINT[-1]])
def test_small_batches(directions, batch):
    x = problem(3, batch)
    loss = MultipleNegativesRankingLoss(directions=directions)
    check_same(lambda: loss.compute_loss_from_embeddings(x), lambda: formula(x, directions=directions), x)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("directions, partition", PARTITIONS)
@pytest.mark.parametrize("mode", HARDNESS)
def test_library(mode, directions, partition, columns):
    x = problem(columns)
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": mode, "hardness_strength": 3.0}
    ours, theirs = MultipleNegativesRankingLoss(None, **options), library()(None, **options)
    check_same(
        lambda: ours.compute_loss_from_embeddings(x, None), lambda: theirs.compute_loss_from_embeddings(x, None), x
    )
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.temperature == theirs.temperature


def test_dot_scores():
    x = problem(3)
    loss = MultipleNegativesRankingLoss(
        scale=1.0, similarity_fct="dot_score", hardness_mode="hard_negatives", hardness_strength=2.0
    )
    options = {"scale": 1.0, "similarity_fct": dot_score, "hardness_mode": "hard_negatives", "hardness_strength": 2.0}
    check_same(lambda: loss.compute_loss_from_embeddings(x, None), lambda: formula(x, **options), x)


def test_as_the_loss_of_a_model():
    """As a trainer calls it: loss(features, labels) with a model that fills in sentence_embedding."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(50, 6, dtype=torch.float64)

        def forward(self, features):
            return {**features, "sentence_embedding": self.table(features["input_ids"]).mean(1)}

    model = Model()
    features = [{"input_ids": torch.randint(0, 50, (5, 4))} for _ in range(3)]
    ours = MultipleNegativesRankingLoss(model)
    check_same(
        lambda: ours(features, None),
        lambda: formula([model(f)["sentence_embedding"] for f in features]),
        [model.table.weight],
    )
    assert dict(ours.named_parameters()).keys() == {"model.table.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """A logit of 20 carries 20 units of rounding into its probability, in every formula of float32."""
    x = [torch.randn(16, 12).to(dtype) for _ in range(3)]
    loss = MultipleNegativesRankingLoss().compute_loss_from_embeddings

    def gradients(f, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in x]
        return torch.autograd.grad(f(leaves), leaves)

    for ours, torchs, right in zip(
        gradients(loss, dtype), gradients(formula, dtype), gradients(formula, torch.float64), strict=True
    ):
        check_gradient(ours, torchs, right, dtype, k=20.0)


@pytest.mark.parametrize("mode", [None, "hard_negatives"])
def test_no_matrix_is_kept(mode):
    x = problem(3, 200, 8)
    loss = MultipleNegativesRankingLoss(directions=JOINT[-1], hardness_mode=mode, hardness_strength=1.0)
    assert largest_saved(lambda: loss.compute_loss_from_embeddings(x)) <= 400 * 9


def test_similarity_functions():
    def of_the_library(a, b):
        raise AssertionError("never called")

    of_the_library.__name__, of_the_library.__module__ = "dot_score", "sentence_transformers.util.similarity"
    assert not MultipleNegativesRankingLoss(similarity_fct=of_the_library).normalize
    for function in (cos_sim, lambda a, b: a @ b.t(), "manhattan", len):
        with pytest.raises(TypeError, match="similarity_fct must be one of"):
            MultipleNegativesRankingLoss(similarity_fct=function)


def test_errors(caplog):
    for options, message in [
        ({"scale": 0.0}, "scale must be > 0"),
        ({"directions": ()}, "directions must be some of"),
        ({"directions": ("doc_to_doc",)}, "query_to_doc among them"),
        ({"directions": ("query_to_doc", "up")}, "directions must be some of"),
        ({"partition_mode": "split"}, "partition_mode must be one of"),
        ({"partition_mode": "per_direction", "directions": JOINT[-1]}, "hold no positive"),
        ({"hardness_mode": "very"}, "hardness_mode must be one of"),
        ({"hardness_strength": -1.0}, "hardness_strength must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultipleNegativesRankingLoss(**options)
    MultipleNegativesRankingLoss(hardness_mode="all_negatives")
    assert "no effect" in caplog.text
    loss = MultipleNegativesRankingLoss()
    with pytest.raises(ValueError, match="embeddings must be 2 to any number of tensors, got 1"):
        loss.compute_loss_from_embeddings([torch.randn(3, 4)])
    with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
        loss.compute_loss_from_embeddings([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(ValueError, match="needs a model"):
        loss([{}, {}], None)
