"""A batch over two gloo processes: every drop-in equals the loss of the whole batch in one process, and its library on
two."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

import rank_problem
from fastloss.compat import grad_cache, lightly, open_clip, sentence_transformers
from fastloss.contrastive.distributed import gather_keys, mean_gradient, mean_over_ranks, place, scale_gradient
from rank_problem import CLIP_MODES, EXCHANGES, GIST, MNRL, RANKS, ROWS, result, whole

LIBRARY_CASES = [
    *(("clip", *mode) for mode in CLIP_MODES),
    *(("siglip", exchange) for exchange in EXCHANGES),
    "NTXentLoss", "DCLLoss", "DCLWLoss", *(("bank", step) for step in range(3)), *MNRL, *GIST,
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_problem.run, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def close(a, b, rtol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def check_whole(ranks, case, expected, leaves, factor=1.0, shared=0):
    """The mean of the ranks' losses is that of the whole batch, their gradients side by side are `factor` times its
    own, and the mean of the last `shared` ones, of parameters that all ranks have, is."""
    parts = [rank["ours"][case] for rank in ranks]
    loss, *grads = result(expected, leaves)
    close(torch.stack([p[0] for p in parts]).mean(), loss)
    split = len(grads) - shared
    for i, grad in enumerate(grads):
        found = [p[1 + i] for p in parts]
        close(torch.cat(found) if i < split else torch.stack(found).mean(0), grad * (factor if i < split else 1.0))


def leaves_of(tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("case", LIBRARY_CASES, ids=str)
def test_library(ranks, case):
    """Rank for rank, value and gradients, before any averaging."""
    for rank in ranks:
        if case not in rank["libraries"]:
            pytest.skip("not installed: the extra `peers`")
        ours, theirs = rank["ours"][case], rank["libraries"][case]
        for a, b in zip(ours, theirs, strict=True):
            if a.dtype == torch.float64:
                close(a, b, rtol=1e-9)
            else:  # the bank's steps are float32
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("local, gradient", CLIP_MODES)
def test_clip(ranks, local, gradient):
    """W times the gradient of the whole batch where gathered features have gradients: DistributedDataParallel's mean
    over the ranks makes it right. Without them it is the whole batch's own (open_clip issue 616)."""
    if local and not gradient:  # no gradient of keys: not that of any loss of the whole batch
        return
    x = leaves_of(whole(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = open_clip.ClipLoss()(*x, scale)
    check_whole(ranks, ("clip", local, gradient), expected, [*x, scale], RANKS if gradient else 1.0, shared=1)
    if not local:
        for rank in ranks:
            close(rank["ours"]["clip", local, gradient][0], expected.detach())


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_siglip(ranks, exchange):
    x = leaves_of(whole(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    expected = open_clip.SigLipLoss()(*x, scale, bias)
    check_whole(ranks, ("siglip", exchange), expected, [*x, scale, bias], RANKS, shared=2)


@pytest.mark.parametrize("loss", [lightly.NTXentLoss(0.3), lightly.DCLLoss()])
def test_lightly(ranks, loss):
    x = leaves_of(whole(2))
    check_whole(ranks, type(loss).__name__, loss(*x), x, RANKS)


def test_banks_are_alike(ranks):
    for step in range(3):
        a, b = (rank["ours"]["bank", step][-1] for rank in ranks)
        assert a.equal(b)


@pytest.mark.parametrize("name", MNRL)
def test_multiple_negatives(ranks, name):
    x = leaves_of(whole(3))
    loss = sentence_transformers.MultipleNegativesRankingLoss(None, **MNRL[name])
    check_whole(ranks, name, loss.compute_loss_from_embeddings(x), x, RANKS)


def test_gist(ranks):
    x, name = leaves_of(whole(3)), "gist without anchors"  # pairs of anchors are the rank's own
    loss = sentence_transformers.GISTEmbedLoss(**GIST[name])
    check_whole(ranks, name, loss.compute_loss_from_embeddings(x, whole(3, 9, 3)), x, RANKS)


def test_grad_cache(ranks):
    x = leaves_of([whole(1)[0], torch.cat(whole(2, 5))])
    check_whole(ranks, "grad cache", grad_cache.SimpleContrastiveLoss(1)(*x), x)


def test_gather(ranks):
    """The sum of x^3 on each of two ranks: 3 x^2 from both; and the derivative of that, 6 x from both."""
    x = whole(1)[0]
    for i, rank in enumerate(ranks):
        gathered, once, twice = rank["ours"]["gather"]
        own = x[i * ROWS : (i + 1) * ROWS]
        close(gathered, x)
        close(once, RANKS * 3 * own**2)
        close(twice, RANKS * 6 * own)


def test_errors(ranks):
    for rank in ranks:
        assert "equally many rows" in rank["errors"]["uneven"][0] and "[2, 3]" in rank["errors"]["uneven"][0]
        assert "do not agree with the process group" in rank["errors"]["place"][0]
        assert "no target" in rank["errors"]["target"][0]


def test_one_process_needs_no_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert place() == (0, 1)
    assert gather_keys(x) is x and mean_gradient(x) is x and mean_over_ranks(x) is x and scale_gradient(x, 1.0) is x
    assert not gather_keys(x, gradient=False).requires_grad
    with pytest.raises(RuntimeError, match="init_process_group"):
        grad_cache.DistributedContrastiveLoss()
