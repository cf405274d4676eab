"""GISTEmbedLoss of fastloss.compat.sentence_transformers against a row-by-row formula and against the library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.sentence_transformers import GISTEmbedLoss
from peers import check_same, embeddings, largest_saved, module_of


def cosine(a, b):
    return F.cosine_similarity(a[:, None], b[None], dim=2)


def formula(
    x, guides, temperature=0.01, margin_strategy="absolute", margin=0.0, contrast_anchors=True, contrast_positives=True
):
    """Row by row: the candidates whose similarity to the guide is not above the limit; a row is none of its own."""
    total, rows = 0.0, range(len(x[0]))
    names = {"anchor": 0, "positive": 1, "negative": 2}
    pools = [("anchor", "positive")]
    pools += [("anchor", "anchor")] if contrast_anchors else []
    pools += [("positive", "positive")] if contrast_positives else []
    pools += [("anchor", "negative")] if len(x) == 3 else []
    own = cosine(guides[0], guides[1]).diagonal()
    for i in rows:
        limit = own[i] - margin * (1 if margin_strategy == "absolute" else abs(own[i]))
        logits = [cosine(x[0], x[1])[i, i] / temperature]
        for a, b in pools:
            similarity, guided = cosine(x[names[a]], x[names[b]])[i], cosine(guides[names[a]], guides[names[b]])[i]
            logits += [
                similarity[j] / temperature for j in rows if guided[j] <= limit and not (b != "negative" and j == i)
            ]
        total = total + torch.stack(logits).logsumexp(0) - logits[0]
    return total / len(x[0])


def problem(columns, batch=9, dim=5, guide_dim=3):
    x = [embeddings(batch, dim) for _ in range(columns)]
    guides = [torch.randn(batch, guide_dim, dtype=torch.float64) for _ in range(columns)]
    guides[1] = guides[1] + 2 * guides[0]  # a guide that mostly agrees, so that limits are high
    return x, guides


OPTIONS = [
    {},
    {"margin": 0.3},
    {"margin": 0.3, "margin_strategy": "relative"},
    {"margin": -0.05, "margin_strategy": "relative"},
    {"contrast_anchors": False},
    {"contrast_positives": False, "temperature": 0.2},
    {"contrast_anchors": False, "contrast_positives": False, "margin": 0.1},
]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_formula(options, columns):
    x, guides = problem(columns)
    loss = GISTEmbedLoss(**{"temperature": 0.1, **options}).compute_loss_from_embeddings
    check_same(lambda: loss(x, guides), lambda: formula(x, guides, **{"temperature": 0.1, **options}), x)


def test_defaults():
    x, guides = problem(3)
    check_same(lambda: GISTEmbedLoss().compute_loss_from_embeddings(x, guides), lambda: formula(x, guides), x)


class Tokenizer:
    """Numbers as texts; each vocabulary writes them in its own way."""

    def __init__(self, base):
        self.base = base

    def get_vocab(self):
        return {"base": self.base}

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(int(i) - self.base) for i in row) for row in ids]


class Model(torch.nn.Module):
    """A table of token embeddings, and a tokenizer."""

    device, max_seq_length = torch.device("cpu"), 16

    def __init__(self, base=0):
        super().__init__()
        self.tokenizer, self.base = Tokenizer(base), base
        self.table = torch.nn.Embedding(60, 6, dtype=torch.float64)

    def preprocess(self, texts):
        return {"input_ids": torch.tensor([[int(word) + self.base for word in text.split()] for text in texts])}

    def forward(self, features):
        features["sentence_embedding"] = self.table(features["input_ids"]).mean(1)
        return features


def of_models(columns, base):
    model, guide = Model(), Model(base)
    ids = [torch.randint(0, 50, (8, 4)) for _ in range(columns)]
    guides = [guide.table(i + base).mean(1).detach() for i in ids]
    return model, guide, ids, guides


@pytest.mark.parametrize("base", [0, 7])
def test_as_the_loss_of_a_model(base):
    """A guide of the same vocabulary takes the tokens, one of another reads the texts."""
    model, guide, ids, guides = of_models(3, base)
    loss = GISTEmbedLoss(model, guide, temperature=0.1)
    assert loss.must_retokenize == (base != 0)
    check_same(
        lambda: loss([{"input_ids": i} for i in ids], None),
        lambda: formula([model.table(i).mean(1) for i in ids], guides, 0.1),
        [model.table.weight],
    )
    assert guide.table.weight.grad is None
    features = [{"input_ids": i} for i in ids]
    loss(features, None)  # what a model writes into its features stays there: losses around this one read it
    assert all(f["sentence_embedding"].requires_grad for f in features)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_library(options, columns):
    stand_ins = {
        "transformers": {"PreTrainedTokenizerBase": Tokenizer},
        "sentence_transformers.base.losses.merged_forward": {
            "embed_columns": lambda model, features: [model(f)["sentence_embedding"] for f in features]
        },
        "sentence_transformers.sentence_transformer.model": {"SentenceTransformer": object},
        "sentence_transformers.sentence_transformer.modules": {"StaticEmbedding": ()},
        "sentence_transformers.util": {
            "all_gather_with_grad": None, "batch_to_device": lambda batch, device: batch, "get_rank": lambda: 0,
        },
    }  # fmt: skip
    theirs = module_of("sentence_transformers.sentence_transformer.losses.gist_embed", stand_ins).GISTEmbedLoss
    model, guide, ids, _ = of_models(columns, 0)
    ours, right = GISTEmbedLoss(model, guide, **options), theirs(model, guide, **options)
    check_same(
        lambda: ours([{"input_ids": i} for i in ids], None),
        lambda: right([{"input_ids": i} for i in ids], None),
        [model.table.weight],
    )
    assert ours.get_config_dict() == right.get_config_dict()


def test_copies_of_the_positive_stay():
    """A candidate as close to the guide as the positive is not above the limit, whatever rounding says."""
    x, guides = [torch.randn(40, 5) for _ in range(2)], [torch.randn(40, 33) for _ in range(2)]
    guides[1] = guides[1][:1].expand(40, 33)  # all positives are one text to the guide
    options = {"contrast_anchors": False, "contrast_positives": False, "temperature": 1.0}
    logits = cosine(*x)
    expected = F.cross_entropy(logits, torch.arange(40))
    torch.testing.assert_close(GISTEmbedLoss(**options).compute_loss_from_embeddings(x, guides), expected)


def test_a_row_is_no_candidate_of_its_own():
    """Anchor and positive are one text to the guide: the limit is 1, and the pair of an anchor with itself is at 1."""
    x = [embeddings(4, 5) for _ in range(2)]
    guides = [torch.randn(4, 3, dtype=torch.float64)] * 2
    loss = GISTEmbedLoss(temperature=0.1).compute_loss_from_embeddings

    def dense():
        ap, aa, pp = cosine(*x), cosine(x[0], x[0]), cosine(x[1], x[1])
        aa, pp = (m.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf) for m in (aa, pp))
        return F.cross_entropy(torch.cat((ap, aa, pp), 1) / 0.1, torch.arange(4))

    check_same(lambda: loss(x, guides), dense, x)


def test_no_matrix_is_kept():
    x, guides = problem(3, 200, 8)
    assert largest_saved(lambda: GISTEmbedLoss().compute_loss_from_embeddings(x, guides)) <= 200 * 9


def test_errors():
    for options, message in [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"margin_strategy": "both"}, "margin_strategy must be one of"),
        ({"model": Model()}, "come together"),
        ({"model": Model(), "guide": torch.nn.Identity()}, "the guide must have a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            GISTEmbedLoss(**options)
    x, guides = problem(3)
    loss = GISTEmbedLoss()
    with pytest.raises(ValueError, match="embeddings must be 2 to 3 tensors, got 1"):
        loss.compute_loss_from_embeddings(x[:1], guides)
    with pytest.raises(ValueError, match="of the same texts"):
        loss.compute_loss_from_embeddings(x, guides[:2])
    with pytest.raises(ValueError, match="needs a model"):
        loss([{}, {}], None)
    with pytest.raises(ValueError, match="needs input_ids"):
        GISTEmbedLoss(Model(), Model(3))([{"pixel_values": torch.zeros(2)}] * 2, None)
