"""Predictions: tokens drawn from the softmax, the largest and the k largest of logits that are never stored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.sampling import philox
from sampling import INF, ROWS, check_draw, chi_square, sample_rows, tail_rows

OPS = torch.ops.fastloss
BACKENDS = ("cpp", "reference")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def head(n: int = 21, d: int = 8, v: int = 501, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.to(dtype) for t in (torch.randn(n, d), torch.randn(v, d), torch.randn(v)))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- the noise


@pytest.mark.parametrize(
    "counter, seed, words",
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter: int, seed: int, words: tuple[int, ...]) -> None:
    """The vectors that Random123 publishes."""
    c = torch.tensor([counter])
    assert tuple(int(w) for w in philox((c, c, c, c), torch.tensor(seed))) == words


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("name", ROWS)
@DTYPES
def test_cpp_draws_what_the_noise_says(
    name: str, dtype: torch.dtype, isa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa > backend_cpp._C.best_isa():
        pytest.skip(f"this machine has no {backend_cpp._C.isa_name(isa)}")
    monkeypatch.setattr(backend_cpp, "ISA", isa)
    z, streams, seed = sample_rows(name, dtype), torch.tensor([0, 5, -1, 1 << 40, 7]), torch.tensor(-3)
    for scale, cap in ((1.0, 0.0), (0.6, 0.0), (-1.0, 0.0), (0.7, 20.0)):
        if scale < 0 and name == "one huge":  # a tie of nothing
            continue
        with fastloss.use_backend("cpp"):
            index, logp = OPS.row_sample(z, seed, streams, scale, cap)
        check_draw(index, logp, z, seed, streams, scale, cap)


@pytest.mark.parametrize("name", ROWS)
@DTYPES
def test_all_backends_draw_the_same(name: str, dtype: torch.dtype) -> None:
    z, streams, seed = sample_rows(name, dtype), torch.arange(5), torch.tensor(11)
    drawn = []
    for backend in BACKENDS:
        with fastloss.use_backend(backend):
            drawn.append(OPS.row_sample(z, seed, streams, 0.9, 0.0))
    assert torch.equal(drawn[0][0], drawn[1][0])
    torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tail_has_64_bits(backend: str) -> None:
    logits, seed, streams, drawn = tail_rows()
    with fastloss.use_backend(backend):
        assert torch.equal(OPS.row_sample(logits, seed, streams)[0], drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, backend: str) -> None:
    args = (torch.randn(9, 37).to(dtype), torch.tensor(4), torch.arange(9), 0.7, 3.0)
    if backend == "cpp" and dtype == torch.float64:
        return
    with fastloss.use_backend(backend):
        torch.library.opcheck(OPS.row_sample.default, args)


def test_kernels_are_what_users_reach_by_default() -> None:
    assert fastloss.registry.choose("row_sample", torch.randn(2, 9), torch.tensor(0), torch.arange(2)) == "cpp"


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(50),
        torch.zeros(1000),
        -torch.arange(1.0, 201.0).log() * 1.5,
        torch.tensor([0.0, -5.0, -8.0, -11.0, -INF]),
        torch.linspace(-12, 3, 77) + 1e4,
    ],
    ids=["flat", "wide", "zipf", "skewed", "offset"],
)
def test_draws_follow_the_softmax(row: Tensor) -> None:
    """A million draws: within 4 standard deviations of chi-square; fixed seeds, so that it passes or fails for good."""
    counts = torch.zeros(len(row), dtype=torch.int64)
    n = 50_000
    for seed in range(20):
        index = fastloss.row_sample(row.expand(n, -1), seed=seed).index
        counts += torch.bincount(index, minlength=len(row))
    assert abs(chi_square(counts, row.double().softmax(0))) < 4


def test_streams_and_seeds_are_independent() -> None:
    """Pairs of draws: neighbouring streams, and one stream under neighbouring seeds, fill the whole square evenly."""
    row, n, v = torch.zeros(8), 100_000, 8
    a = fastloss.row_sample(row.expand(n, v), seed=1).index
    b = fastloss.row_sample(row.expand(n, v), seed=2).index
    uniform = torch.full((v * v,), 1 / v**2)
    for pair in (a[::2] * v + a[1::2], a * v + b):
        assert abs(chi_square(torch.bincount(pair, minlength=v * v), uniform)) < 4


def test_chi_square_sees_a_bias() -> None:
    p = torch.full((50,), 0.02)
    counts = (p * 1_000_000).long()
    counts[0] += 1000
    assert chi_square(counts, p) > 1 or chi_square(counts * 2, p) > 4


def test_temperature_and_top_k() -> None:
    row, n, k = torch.randn(40) * 2, 200_000, 5
    drawn = fastloss.row_sample(row.expand(n, -1), seed=3, temperature=0.7, top_k=k)
    kept = torch.full_like(row, -INF).scatter(0, row.topk(k).indices, row.topk(k).values) / 0.7
    assert abs(chi_square(torch.bincount(drawn.index, minlength=40), kept.softmax(0))) < 4
    torch.testing.assert_close(drawn.logp, kept.log_softmax(0)[drawn.index])
    whole = fastloss.row_sample(row.expand(n, -1), seed=3, temperature=0.7).index
    inside = (whole[:, None] == row.topk(k).indices).any(1)
    assert torch.equal(whole[inside], drawn.index[inside])  # the noise belongs to the column


def test_softcap_is_taken_before_the_temperature() -> None:
    z = torch.randn(7, 90) * 40
    drawn = fastloss.row_sample(z, seed=1, temperature=0.5, softcap=15.0, logit_scale=0.8)
    truth = (15 * torch.tanh(0.8 * z.double() / 15) / 0.5).log_softmax(-1)
    torch.testing.assert_close(drawn.logp.double(), truth.gather(1, drawn.index[:, None])[:, 0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- seeds and streams


def test_seeds() -> None:
    z = torch.zeros(64, 1000)
    one = fastloss.row_sample(z, seed=1)
    assert torch.equal(one.index, fastloss.row_sample(z, seed=torch.tensor(1)).index)
    assert not torch.equal(one.index, fastloss.row_sample(z, seed=2).index)
    assert not torch.equal(one.index, fastloss.row_sample(z, seed=1 + (1 << 32)).index)
    assert torch.equal(fastloss.row_sample(z, seed=-1).index, fastloss.row_sample(z, seed=2**64 - 1).index)
    torch.manual_seed(5)
    first, second = fastloss.row_sample(z).index, fastloss.row_sample(z).index
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(fastloss.row_sample(z).index, first)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    made = [fastloss.row_sample(z, generator=g).index for g in generators]
    assert torch.equal(*made) and not torch.equal(made[0], first)


def test_streams() -> None:
    """A row keeps its noise wherever it stands in a batch; high and low words of its stream both count."""
    z, streams = torch.randn(6, 500), torch.tensor([3, 1 << 33, 4, 1, 5, 9])
    drawn = fastloss.row_sample(z, seed=2, streams=streams).index
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert torch.equal(fastloss.row_sample(z[order], seed=2, streams=streams[order]).index, drawn[order])
    flat = fastloss.row_sample(torch.zeros(3, 10_000), seed=2, streams=torch.tensor([1, 1 + (1 << 32), 1])).index
    assert flat[0] != flat[1] and flat[0] == flat[2]


# -------------------------------------------------------------------------------------------------- linear heads


@DTYPES
def test_linear_sample(dtype: torch.dtype) -> None:
    x, w, b = head(dtype=dtype)
    b[3::5] = -INF
    for k in (None, 7):
        given: dict[str, object] = dict(seed=8, temperature=0.8, top_k=k, softcap=30.0, logit_scale=1.5)
        ours = fastloss.linear_sample(x, w, linear_bias=b, **given)  # type: ignore[arg-type]
        theirs = fastloss.row_sample(torch.addmm(b, x, w.T), **given)  # type: ignore[arg-type]
        assert torch.equal(ours.index, theirs.index) and not ((ours.index - 3) % 5 == 0).any()
        torch.testing.assert_close(ours.logp, theirs.logp)
    assert fastloss.linear_sample(x.reshape(3, 7, 8), w, seed=1).index.shape == (3, 7)


def test_chunks_and_threads_do_not_matter() -> None:
    x, w, b = head(300, 4, 700)
    x, w = x.round(), w.round()  # logits that any GEMM makes exactly
    whole = fastloss.linear_sample(x, w, linear_bias=b.round(), seed=6)
    before = torch.get_num_threads()
    try:
        for threads, limit in ((1, None), (2, 700 * 4 * 7), (2, 1)):
            torch.set_num_threads(threads)
            got = fastloss.linear_sample(x, w, linear_bias=b.round(), seed=6, max_extra_bytes=limit)
            assert torch.equal(got.index, whole.index) and torch.equal(got.logp, whole.logp)
        z = torch.randn(1, 100_000)  # one row for two threads
        wide = fastloss.row_sample(z, seed=1)
        torch.set_num_threads(1)
        again = fastloss.row_sample(z, seed=1)
        assert torch.equal(wide.index, again.index) and torch.equal(wide.logp, again.logp)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_argmax_and_topk(dtype: torch.dtype) -> None:
    x, w, b = head(dtype=dtype)
    z = torch.addmm(b, x, w.T)
    slack = 0.0 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps * z.abs().max()  # of another GEMM
    column = fastloss.linear_argmax(x, w, linear_bias=b, max_extra_bytes=10_000)
    assert (z.gather(1, column[:, None])[:, 0] >= z.amax(-1) - slack).all()
    values, indices = fastloss.linear_topk(x, w, 9, linear_bias=b, max_extra_bytes=10_000)
    wide = values.dtype
    exact = dtype != torch.bfloat16  # in which many logits are equal, and another GEMM rounds them otherwise
    torch.testing.assert_close(values, z.topk(9).values.to(wide), **({} if exact else dict(rtol=2**-7, atol=0.1)))
    assert not exact or torch.equal(indices, z.topk(9).indices)
    for scale, cap in ((1.0, None), (0.5, 10.0)):
        capped = z.double() * scale if cap is None else cap * torch.tanh(z.double() * scale / cap)
        top = fastloss.linear_topk(x, w, 9, linear_bias=b, log_probs=True, logit_scale=scale, softcap=cap)
        truth = capped.log_softmax(-1).gather(1, top.indices)
        tight = 2e-6 if exact else 0.1
        torch.testing.assert_close(top.values.double(), truth, rtol=tight, atol=tight)
        assert not exact or torch.equal(top.indices, indices)


def test_topk_with_barred_classes_and_a_softcap() -> None:
    x, w, b = head(6, 4, 12)
    b[4:] = -INF
    values, _ = fastloss.linear_topk(x, w, 12, linear_bias=b, log_probs=True, softcap=2.0)
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(6))
    assert (values[:, 4:] == -INF).all()


def test_argmax_takes_the_lowest_of_equal_columns() -> None:
    w = torch.ones(600, 3)
    assert fastloss.linear_argmax(torch.randn(4, 3), w).tolist() == [0] * 4


def test_empty_and_leading_dimensions() -> None:
    x, w, _ = head()
    for shape in ((0, 8), (2, 0, 8)):
        nothing = torch.empty(shape)
        assert fastloss.linear_sample(nothing, w).index.shape == shape[:-1]
        assert fastloss.linear_argmax(nothing, w).shape == shape[:-1]
        assert fastloss.linear_topk(nothing, w, 3).values.shape == (*shape[:-1], 3)
    assert fastloss.row_sample(torch.randn(9), seed=1).index.shape == ()
    assert fastloss.linear_argmax(x[0], w).shape == ()


def test_operands_that_need_gradients() -> None:
    x, w, b = (t.requires_grad_() for t in head())
    for result in (
        fastloss.linear_sample(x, w, linear_bias=b).logp,
        fastloss.linear_topk(x, w, 2, log_probs=True).values,
        fastloss.row_sample(x @ w.T).logp,
    ):
        assert not result.requires_grad


X, W = torch.randn(3, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: fastloss.row_sample(X, temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda: fastloss.row_sample(X, temperature=torch.nan), ValueError, "nan"),
        (lambda: fastloss.row_sample(X, logit_scale=-1.0), ValueError, "logit_scale"),
        (lambda: fastloss.row_sample(X, softcap=0.0), ValueError, "softcap"),
        (lambda: fastloss.row_sample(X, top_k=5), ValueError, r"top_k must be in 1..4"),
        (lambda: fastloss.row_sample(X, top_k=2.0), TypeError, "float"),
        (lambda: fastloss.row_sample(X, seed=1, generator=torch.Generator()), ValueError, "not both"),
        (lambda: fastloss.row_sample(X, seed=2**64), ValueError, "64 bits"),
        (lambda: fastloss.row_sample(X, seed=1.5), TypeError, "float"),
        (lambda: fastloss.row_sample(X, seed=torch.tensor([1, 2])), ValueError, "2 torch.int64"),
        (lambda: fastloss.row_sample(X, streams=torch.arange(4)), ValueError, r"\(3,\)"),
        (lambda: fastloss.row_sample(X, streams=torch.randn(3)), TypeError, "float32"),
        (lambda: fastloss.row_sample(X.long()), TypeError, "int64"),
        (lambda: fastloss.row_sample(torch.empty(3, 0)), ValueError, "at least one class"),
        (lambda: fastloss.linear_sample(X, W[:, :3]), RuntimeError, "linear_weight"),
        (lambda: fastloss.linear_sample(X, W[:0]), ValueError, "at least one row"),
        (lambda: fastloss.linear_sample(X, W, max_extra_bytes=0), ValueError, "max_extra_bytes"),
        (lambda: fastloss.linear_topk(X, W, 0), ValueError, r"k must be in 1..5"),
        (lambda: fastloss.linear_topk(X, W, 6), ValueError, r"k must be in 1..5"),
        (lambda: OPS.row_sample(X, torch.tensor(1), torch.arange(2)), ValueError, "streams must hold 3"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


PROBE = """
import torch, fastloss
torch.set_num_threads(1)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
x, w, limit = torch.randn(1536, 32), torch.randn(40000, 32), 8 << 20
d = torch.ones(1, 1)
calls = (
    lambda x, w: fastloss.linear_sample(x, w, seed=1, max_extra_bytes=limit),
    lambda x, w: fastloss.linear_sample(x, w, seed=1, top_k=9, max_extra_bytes=limit),
    lambda x, w: fastloss.linear_topk(x, w, 4, log_probs=True, max_extra_bytes=limit),
    lambda x, w: fastloss.linear_argmax(x, w, max_extra_bytes=limit),
    lambda x, w: fastloss.linear_frechet_mean(x, w, d.expand(3, len(w)), max_extra_bytes=limit),
)
for call in calls:
    call(x[:64], w[:512])
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    call(x, w)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_logits_are_stored() -> None:
    """The logits would be 234 MiB. The less of two runs counts: what a heap keeps resident differs from run to run."""
    runs = [
        subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    extra = [min(int(a), int(b)) / 2**20 for a, b in zip(*runs, strict=True)]
    assert len(extra) == 5 and max(extra) < 40, f"MiB: {extra}"
