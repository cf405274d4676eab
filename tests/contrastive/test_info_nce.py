"""info_nce in all its options against one dense matrix of candidates."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from contrastive_checks import NEG, agree, agree_in, cosines, leaves
from fastloss.contrastive import (
    GuideEmbeddings,
    InfoNCELoss,
    gist_embed_loss,
    info_nce,
)

ALL = ("q_to_k", "k_to_q", "q_to_q", "k_to_k")


def dense(
    q, k, scale=20.0, negatives=None, share_negatives=True, shared=None, directions=("q_to_k",), partition="joint",
    in_batch=0.0, hard=0.0, query_ids=None, document_ids=None, negative_ids=None, shared_ids=None, own_margin=None,
    guide=None, keys_meet_negatives=True, label_smoothing=0.0, focal_gamma=0.0, similar=cosines,
):  # fmt: skip
    """Every candidate of every direction in one matrix of logits with -inf where it is masked, then a cross entropy."""
    b = len(q)
    own = torch.arange(b)
    flat = None if negatives is None else negatives.flatten(0, 1)
    m = 0 if negatives is None else negatives.shape[1]
    owner = torch.arange(b * m) // max(m, 1)
    query = own if query_ids is None else query_ids
    row_scale = torch.as_tensor(scale, dtype=q.dtype).expand(b)[:, None]
    positive = similar(q, k).diagonal()[:, None]
    limit = None
    if guide is not None:
        level = similar(guide.q, guide.k).diagonal()[:, None]
        limit = level - guide.margin * (level.abs() if guide.strategy == "relative" else 1.0)

    def block(rows, columns, guide_rows, guide_columns, drop, boost=None):
        s = similar(rows, columns)
        z = row_scale * s
        if boost is not None:
            z = z + boost * s.detach()
        if own_margin is not None:
            drop = drop | ((s > positive + own_margin) & ~keep)
        if guide is not None:
            drop = drop | ((similar(guide_rows, guide_columns) > limit) & ~keep)
        return z.masked_fill(drop, NEG)

    g = guide if guide is not None else GuideEmbeddings(q, k, negatives, shared)
    eye = torch.eye(b, dtype=torch.bool)
    same = (query[:, None] == query[None]) & ~eye
    if document_ids is not None:
        same = same | ((document_ids[:, None] == document_ids[None]) & ~eye)
    # q -> k
    columns, guides, drop, boost = [k], [g.k], [same], [in_batch * (~eye)]
    keep = [eye]
    if negatives is not None:
        mine = owner[None] == own[:, None]
        masked = (query[:, None] == query[owner][None]) & ~mine
        if not share_negatives:
            masked = masked | ~mine
        if document_ids is not None and negative_ids is not None:
            masked = masked | (document_ids[:, None] == negative_ids.flatten()[None])
        columns.append(flat)
        guides.append(None if g.negatives is None else g.negatives.flatten(0, 1))
        drop.append(masked)
        boost.append(torch.where(mine, hard, in_batch))
        keep.append(torch.zeros_like(mine))
    if shared is not None:
        columns.append(shared)
        guides.append(g.shared)
        masked = torch.zeros(b, len(shared), dtype=torch.bool)
        if shared_ids is not None:
            masked = document_ids[:, None] == shared_ids[None]
        drop.append(masked)
        boost.append(torch.full(masked.shape, in_batch))
        keep.append(torch.zeros_like(masked))
    keep_all = torch.cat(keep, 1)
    keep = keep_all
    blocks = [
        block(
            q,
            torch.cat(columns),
            g.q,
            None if guide is None else torch.cat(guides),
            torch.cat(drop, 1),
            torch.cat(boost, 1),
        )
    ]
    keep = eye
    if "k_to_q" in directions:
        blocks.append(block(k, q, g.k, g.q, same))
    keep = torch.zeros_like(eye)
    if "q_to_q" in directions:
        blocks.append(block(q, q, g.q, g.q, same | eye))
    if "k_to_k" in directions:
        columns, guides, drop = [k], [g.k], [same | eye]
        if negatives is not None and share_negatives and keys_meet_negatives:
            masked = query[:, None] == query[owner][None]
            if document_ids is not None and negative_ids is not None:
                masked = masked | (document_ids[:, None] == negative_ids.flatten()[None])
            columns.append(flat)
            guides.append(None if g.negatives is None else g.negatives.flatten(0, 1))
            drop.append(masked)
        keep = torch.zeros(b, sum(map(len, columns)), dtype=torch.bool)
        blocks.append(
            block(k, torch.cat(columns), g.k, None if guide is None else torch.cat(guides), torch.cat(drop, 1))
        )

    def entropy(z):
        return F.cross_entropy(z, own, reduction="none", label_smoothing=label_smoothing)

    nll = entropy(torch.cat(blocks, 1)) if partition == "joint" else sum(map(entropy, blocks)) / len(blocks)
    return (1 - (-nll).exp()) ** focal_gamma * nll if focal_gamma else nll


def problem(b=7, m=2, n=5, d=8):
    q, k, negatives, shared = leaves((b, d), (b, d), (b, m, d), (n, d))
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    return q, k, negatives, shared, scale


@pytest.mark.parametrize("directions", [d for n in range(4) for d in itertools.combinations(ALL[1:], n)])
@pytest.mark.parametrize("hard", ["none", "shared", "own"])
def test_directions(directions, hard):
    q, k, negatives, shared, scale = problem()
    given = {} if hard == "none" else {"negatives": negatives, "share_negatives": hard == "shared"}
    given |= {"directions": ("q_to_k", *directions), "shared": shared}
    ours = info_nce(q, k, scale, reduction="none", **given)
    agree(ours, dense(q, k, scale, **given), (q, k, scale, negatives, shared))


@pytest.mark.parametrize("batch", [1, 2, 40])
def test_symmetric_per_direction(batch):
    q, k, _, _, scale = problem(batch)
    given = {"directions": ("q_to_k", "k_to_q"), "partition": "per_direction"}
    agree(info_nce(q, k, scale, reduction="none", **given), dense(q, k, scale, **given), (q, k, scale))


@pytest.mark.parametrize("mode", ["in_batch", "hard", "all"])
@pytest.mark.parametrize("directions", [("q_to_k",), ALL])
@pytest.mark.parametrize("share", [True, False])
def test_hardness(mode, directions, share):
    q, k, negatives, _, scale = problem()
    strength = {"in_batch": 9.0, "hard": 5.0, "all": 3.0}[mode]
    ours = info_nce(
        q, k, scale, negatives=negatives, share_negatives=share, directions=directions, hardness_mode=mode,
        hardness=strength if mode == "all" else None, reduction="none",
    )  # fmt: skip
    right = dense(
        q, k, scale, negatives, share, directions=directions, in_batch=strength if mode != "hard" else 0.0,
        hard=strength if mode != "in_batch" else 0.0,
    )  # fmt: skip
    agree(ours, right, (q, k, scale, negatives))


@pytest.mark.parametrize("which", ["query", "document", "both", "all"])
def test_ids(which):
    q, k, negatives, shared, scale = problem(9)
    given = {"directions": ALL, "negatives": negatives, "shared": shared}
    if which in ("query", "both", "all"):
        given["query_ids"] = torch.tensor([0, 1, 0, 2, 3, 3, 4, 5, -1])
    if which in ("document", "both", "all"):
        given["document_ids"] = torch.tensor([7, 7, 1, 2, 3, 4, 5, 2, 6])
    if which == "all":
        given |= {"negative_ids": torch.arange(18).view(9, 2) % 9, "shared_ids": torch.tensor([7, 100, 3, 2, 200])}
    agree(
        info_nce(q, k, scale, reduction="none", **given), dense(q, k, scale, **given), (q, k, negatives, shared, scale)
    )


@pytest.mark.parametrize("share", [True, False])
def test_own_margin(share):
    q, k, negatives, shared, scale = problem(20)
    given = {"directions": ALL, "negatives": negatives, "share_negatives": share, "shared": shared, "own_margin": 0.1}
    ours = info_nce(q, k, scale, reduction="none", **given)
    agree(ours, dense(q, k, scale, **given), (q, k, negatives, shared, scale))
    assert (ours < dense(q, k, scale, **{**given, "own_margin": None})).any()


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("directions", [("q_to_k", "k_to_q"), ALL])
def test_guide(strategy, directions):
    q, k, negatives, shared, scale = problem(20)
    told = GuideEmbeddings(*leaves((20, 4), (20, 4), (20, 2, 4), (5, 4)), margin=0.15, strategy=strategy)
    given = {"directions": directions, "negatives": negatives, "shared": shared, "guide": told}
    agree(
        info_nce(q, k, scale, reduction="none", **given), dense(q, k, scale, **given), (q, k, negatives, shared, scale)
    )


@pytest.mark.parametrize("hard", [False, True])
def test_gist(hard):
    q, k, negatives, _, _ = problem(20)
    told = GuideEmbeddings(*leaves((20, 4), (20, 4), (20, 2, 4)))
    ours = gist_embed_loss(q, k, told, negatives=negatives if hard else None, reduction="none")
    right = dense(
        q, k, 100.0, negatives if hard else None, directions=("q_to_k", "q_to_q", "k_to_k"), guide=told,
        keys_meet_negatives=False,
    )  # fmt: skip
    agree(ours, right, (q, k) + ((negatives,) if hard else ()), rtol=1e-8)


@pytest.mark.parametrize("directions", [("q_to_k",), ("q_to_k", "k_to_q")])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize("normalize", [True, False])
def test_label_smoothing(directions, partition, normalize):
    q, k, _, shared, scale = problem()
    given = {"directions": directions, "partition": partition, "label_smoothing": 0.1, "shared": shared}
    ours = info_nce(q, k, scale, normalize=normalize, reduction="none", **given)
    similar = cosines if normalize else lambda a, b: a @ b.t()
    agree(ours, dense(q, k, scale, similar=similar, **given), (q, k, scale, shared))


def test_label_smoothing_over_own_negatives():
    q, k, negatives, _, scale = problem(
        1
    )  # one row: its own hard negatives are all there are, also in the dense matrix
    given = {"label_smoothing": 0.2, "negatives": negatives}
    for share in (True, False):
        ours = info_nce(q, k, scale, share_negatives=share, reduction="none", **given)
        agree(ours, dense(q, k, scale, **given), (q, k, scale, negatives))


def test_scale_of_each_row():
    q, k, negatives, _, _ = problem()
    scale = (torch.rand(7, dtype=torch.float64) * 20 + 1).requires_grad_()
    given = {"directions": ALL, "negatives": negatives}
    agree(info_nce(q, k, scale, reduction="none", **given), dense(q, k, scale, **given), (q, k, scale, negatives))


def test_shared_half_filled():
    q, k, _, shared, scale = problem()
    right = dense(q, k, scale, shared=shared[:2], directions=ALL)
    with torch.no_grad():
        shared[2:] = float("nan")
    valid = torch.arange(5) < 2
    ours = info_nce(q, k, scale, shared=shared.detach(), shared_valid=valid, directions=ALL, reduction="none")
    agree(ours, right, (q, k, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    inputs = leaves((32, 16), (32, 16), (32, 2, 16))

    def ours(q, k, n):
        return info_nce(q, k, 10.0, negatives=n, directions=ALL)

    # A logit of 10 is rounded by 10 eps, which is the relative error of its probability.
    agree_in(dtype, ours, lambda q, k, n: dense(q, k, 10.0, n, directions=ALL).mean(), inputs, k=20)


def test_modules():
    q, k, negatives, _, _ = problem()
    assert torch.equal(InfoNCELoss()(q, k, negatives=negatives), info_nce(q, k, 20.0, negatives=negatives))


def test_bad_input():
    q, k = torch.randn(2, 4, 8)
    negatives, shared, ids = torch.randn(4, 2, 8), torch.randn(3, 8), torch.arange(4)
    told = GuideEmbeddings(q, k)
    for given, message in (
        ({"k": k[:3]}, "one shape"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": torch.tensor([1.0, 2.0, -1.0, 1.0])}, "scale must be"),
        ({"scale": torch.ones(3)}, "scale must be"),
        ({"negatives": negatives[:3]}, "negatives must be"),
        ({"shared": shared[:, :2]}, "shared must be"),
        ({"directions": ("q_to_q",)}, "must hold q_to_k"),
        ({"directions": ("q_to_k", "up")}, "directions must be among"),
        ({"directions": ALL, "partition": "per_direction"}, "joint"),
        ({"partition": "both"}, "partition must be"),
        ({"hardness_mode": "soft"}, "hardness_mode must be"),
        ({"hardness_mode": "all"}, "no published strength"),
        ({"hardness_mode": "hard", "hardness": -1.0}, "hardness must be"),
        ({"hardness": 1.0}, "needs a hardness_mode"),
        ({"query_ids": ids[:3]}, "query_ids must have shape"),
        ({"negative_ids": ids}, "negative_ids was given"),
        ({"negatives": negatives, "negative_ids": ids.view(4, 1)}, "negative_ids must have shape"),
        ({"shared": shared, "shared_ids": ids[:3]}, "pass those too"),
        ({"shared_valid": torch.ones(3, dtype=torch.bool)}, "shared_valid was given"),
        ({"guide": told, "negatives": negatives}, "guide has no negatives"),
        ({"guide": told, "shared": shared}, "guide has no shared"),
        *(
            (
                {"guide": GuideEmbeddings(q, k, n), "negatives": negatives, "share_negatives": share},
                "guide's negatives must",
            )
            for n in (negatives[:, :1], negatives[:1], negatives[..., :3], negatives[0])
            for share in (True, False)
        ),
        ({"guide": GuideEmbeddings(q, k, None, shared[:1]), "shared": shared}, "guide's shared must have"),
        ({"guide": GuideEmbeddings(q[:1], k[:1])}, "guide's q and k must be"),
        ({"guide": GuideEmbeddings(q, k[:, :3])}, "guide's q and k must be"),
        ({"own_margin": float("nan")}, "own_margin must be finite, got nan"),
        ({"label_smoothing": 0.1, "own_margin": 0.1}, "label_smoothing takes"),
        ({"label_smoothing": 1.1}, "label_smoothing must be"),
        ({"focal_gamma": -1.0}, "focal_gamma must be"),
        ({"reduction": "max"}, "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            info_nce(**{"q": q, "k": k, **given})
    with pytest.raises(TypeError, match="integers"):
        info_nce(q, k, query_ids=torch.randn(4))
    with pytest.raises(ValueError, match="strategy"):
        GuideEmbeddings(q, k, strategy="both")
    with pytest.raises(ValueError, match="margin must be finite, got nan"):
        GuideEmbeddings(q, k, margin=float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_copies_of_the_positive_are_kept(dtype, normalize):
    """All positives are one text to the guide, or to the model: nothing is above a margin of 0, whatever rounding says."""
    q, k, told, negatives = torch.randn(40, 33), torch.randn(40, 33), torch.randn(40, 33), torch.randn(40, 2, 33)
    q, k, told, negatives = (x.to(dtype) for x in (q, k, told, negatives))
    guide = GuideEmbeddings(told, told[:1].expand(40, 33), told[:1].expand(80, 33).view(40, 2, 33))
    given = {"negatives": negatives, "directions": ("q_to_k",), "normalize": normalize}
    plain = info_nce(q, k, 2.0, **given)
    torch.testing.assert_close(info_nce(q, k, 2.0, guide=guide, **given), plain, rtol=1e-6, atol=0)
    k, negatives = k[:1].expand(40, 33), k[:1].expand(80, 33).view(40, 2, 33)
    for share in (True, False):
        given = {"negatives": negatives, "share_negatives": share, "normalize": normalize}
        plain = info_nce(q, k, 2.0, **given)
        torch.testing.assert_close(info_nce(q, k, 2.0, own_margin=0.0, **given), plain, rtol=1e-6, atol=0)


def test_a_bfloat16_guide_is_normalised_in_float32():
    q, k = torch.randn(2, 60, 16)
    told = [torch.randn(60, 8).bfloat16() for _ in range(2)]
    ours = gist_embed_loss(q, k, GuideEmbeddings(*told), 1.0, reduction="none")
    right = gist_embed_loss(q, k, GuideEmbeddings(*(x.double() for x in told)), 1.0, reduction="none")
    torch.testing.assert_close(ours, right)
