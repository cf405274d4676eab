"""DFloat11 files, made here by an encoder that knows nothing of the reader."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import accumulate

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastloss
from fastloss import registry
from fastloss.lossless import CompressedTensor, CorruptError, FormatError, load_dfloat11
from guarded_bytes import Guarded
from lossless_cases import bits, normal

END = 256  # the code that fills up the last byte
BACKENDS = registry.backends("dfloat11_decode_checked")


def huffman_lengths(counts: dict[int, int]) -> dict[int, int]:
    """Code lengths by joining the two rarest groups until one is left."""
    groups = [(count, [symbol]) for symbol, count in counts.items()]
    lengths = dict.fromkeys(counts, 0)
    while len(groups) > 1:
        groups.sort(key=lambda group: (-group[0], group[1]))
        (a, first), (b, second) = groups.pop(), groups.pop()
        for symbol in first + second:
            lengths[symbol] += 1
        groups.append((a + b, first + second))
    return lengths


def words_of(lengths: dict[int, int]) -> dict[int, str]:
    """Code words of these lengths, the shortest first, counting upwards."""
    words, value, before = {}, 0, 0
    for symbol in sorted(lengths, key=lambda s: (lengths[s], s)):
        value <<= lengths[symbol] - before
        before = lengths[symbol]
        words[symbol] = format(value, f"0{before}b")
        value += 1
    assert value <= 1 << before, "these lengths are no code"
    return words


def tables_of(words: dict[int, str]) -> Tensor:
    """The look-up tables: a row for each whole number of bytes in which a longer word begins, then the lengths."""
    words = {symbol: word for symbol, word in words.items() if symbol != END}
    begins = {word[: 8 * k] for word in words.values() for k in range((len(word) - 1) // 8 + 1)}
    rows = sorted(begins, key=len)
    table = torch.zeros(len(rows) + 1, 256, dtype=torch.uint8)
    for row, begin in enumerate(rows):
        for symbol, word in words.items():
            if not word.startswith(begin):
                continue
            rest = word[len(begin) :]
            if len(rest) > 8:
                table[row, int(rest[:8], 2)] = 256 - rows.index(begin + rest[:8])
            else:
                low = int(rest.ljust(8, "0"), 2)
                table[row, low : low + (1 << (8 - len(rest)))] = symbol
    for symbol, word in words.items():
        table[-1, symbol] = len(word)
    return table


def buffers_of(
    x: Tensor, lengths: dict[int, int] | None = None, width: int = 8, threads: int = 512
) -> dict[str, Tensor]:
    """The buffers of one compressed unit; `x` flat bf16."""
    word = x.contiguous().reshape(-1).view(torch.int16).to(torch.int64) & 0xFFFF
    exponents = (word >> 7 & 255).tolist()
    if lengths is None:
        counts = {s: exponents.count(s) for s in set(exponents)}
        lengths = huffman_lengths(counts | {END: 1})
    words = words_of(lengths)
    starts = [0, *accumulate(len(words[e]) for e in exponents)]
    total = starts.pop()
    text = "".join(words[e] for e in exponents)
    begun = list(starts)
    if total % 8:
        begun.append(total)
        text += words[END][: 8 - total % 8].ljust(8 - total % 8, "0")
    codes = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    blocks = -(-len(codes) // (width * threads))
    gaps: dict[int, int] = {}
    positions: dict[int, int] = {}
    for i, start in enumerate(begun):
        gaps.setdefault(start // (8 * width), start % (8 * width))
        positions.setdefault(start // (8 * width * threads), i)
    gap_text = "".join(format(gaps.get(t, 0), "05b") for t in range(blocks * threads))
    gap_text = gap_text.ljust(-(-len(gap_text) // 8) * 8, "0")
    ends = torch.tensor([*positions.values(), len(exponents)], dtype=torch.int32)
    return {
        "luts": tables_of(words),
        "encoded_exponent": torch.tensor(codes, dtype=torch.uint8),
        "sign_mantissa": (word >> 8 & 0x80 | word & 0x7F).to(torch.uint8),
        "output_positions": ends.view(torch.uint8),
        "gaps": torch.tensor([int(gap_text[i : i + 8], 2) for i in range(0, len(gap_text), 8)], dtype=torch.uint8),
        "split_positions": torch.empty(0, dtype=torch.int64),
    }


def decode(buffers: dict[str, Tensor], backend: str, width: int = 8, threads: int = 512) -> tuple[Tensor, int]:
    names = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
    args = *(buffers[name] for name in names), buffers["sign_mantissa"].numel(), width, threads
    with fastloss.use_backend(backend):
        plain = torch.ops.fastloss.dfloat11_decode(*args)
        out, bad = registry.run("dfloat11_decode_checked", *args)
    assert torch.equal(bits(plain), bits(out))
    return out, bad


def from_exponents(exponents: Iterable[int], seed: int = 0) -> Tensor:
    """Numbers of these exponents with any signs and mantissas."""
    e = torch.tensor(list(exponents), dtype=torch.int64)
    other = torch.randint(0, 256, e.shape, generator=torch.Generator().manual_seed(seed))
    word = (other & 0x80) << 8 | e << 7 | other & 0x7F
    return ((word ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def pick(symbols: list[int], count: int, seed: int = 0) -> list[int]:
    index = torch.randint(0, len(symbols), (count,), generator=torch.Generator().manual_seed(seed))
    return [symbols[i] for i in index.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 2, 3, 24, 25, 1000, 40000])
def test_weights(numel, backend):
    x = normal(numel, torch.bfloat16)
    out, bad = decode(buffers_of(x), backend)
    assert bad == -1 and torch.equal(bits(out), bits(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [1, 8, 9, 16, 17, 24, 25, 32])
def test_code_lengths(longest, backend):
    """Words of 1, 2, ... bits: one to four tables."""
    symbols = list(range(100, 100 + longest))
    lengths = {s: i + 1 for i, s in enumerate(symbols)} | {END: longest}
    x = from_exponents(pick(symbols, 6000))
    buffers = buffers_of(x, lengths)
    assert buffers["luts"].shape[0] == (longest - 1) // 8 + 2
    out, bad = decode(buffers, backend)
    assert bad == -1 and torch.equal(bits(out), bits(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_seventeen_tables(backend):
    """As many tables as values name: sixteen symbols, each alone behind its own first byte."""
    lengths = {s: 9 for s in range(1, 33)} | {END: 1}
    x = from_exponents(pick(list(range(1, 33)), 3000))
    buffers = buffers_of(x, lengths)
    assert buffers["luts"].shape[0] == 18
    out, bad = decode(buffers, backend)
    assert bad == -1 and torch.equal(bits(out), bits(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_exponents(backend):
    """Infinities and NaN are read as long as their exponents name no table."""
    x = from_exponents(pick([0, 1, 120, 121, 250, 254, 255], 900))
    lengths = {0: 2, 120: 2, 121: 3, 1: 3, 250: 3, 254: 4, 255: 5, END: 5}
    out, bad = decode(buffers_of(x, lengths), backend)
    assert bad == -1 and torch.equal(bits(out), bits(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width, threads", [(4, 1), (5, 3), (8, 1), (8, 4), (8, 1024)])
def test_geometry(width, threads, backend):
    lengths = {s: i + 1 for i, s in enumerate(range(100, 130))} | {END: 30}
    x = from_exponents(pick(list(range(100, 130)), 700))
    buffers = buffers_of(x, lengths, width, threads)
    out, bad = decode(buffers, backend, width, threads)
    assert bad == -1 and torch.equal(bits(out), bits(x))


def config(width: int = 8, threads: int = 512, **more: object) -> dict[str, object]:
    patterns: dict[str, list[str]] = {r"model\.layers\.\d+": ["mlp.up", "mlp.down"], "lm_head": []}
    return {
        "hidden_size": 64,
        "dfloat11_config": {
            "version": "0.5.0", "threads_per_block": [threads], "bytes_per_thread": width, "pattern_dict": patterns,
        } | more,
    }  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two shards, and what it holds."""
    up, down, head = normal(64 * 48, torch.bfloat16, 1), normal(48 * 64, torch.bfloat16, 2), normal(640, torch.bfloat16)
    norm = torch.linspace(0, 1, 64)
    block = buffers_of(torch.cat((up, down))) | {"split_positions": torch.tensor([up.numel()])}
    first = {f"model.layers.3.{name}": t for name, t in block.items()} | {"model.norm.weight": norm}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file({f"lm_head.{name}": t for name, t in buffers_of(head).items()}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config()))
    return tmp_path, {
        "model.layers.3.mlp.up.weight": up, "model.layers.3.mlp.down.weight": down, "lm_head.weight": head,
        "model.norm.weight": norm,
    }  # fmt: skip


def test_a_checkpoint(checkpoint):
    folder, want = checkpoint
    got = load_dfloat11(folder)
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype and torch.equal(bits(got[name]), bits(t))


def test_shapes_and_blobs(checkpoint):
    folder, want = checkpoint
    shapes = {"model.layers.3.mlp.up.weight": (48, 64), "model.layers.3.mlp.down.weight": (64, 48)}
    got = load_dfloat11(folder, shapes=shapes, recompress=True)
    assert {name for name, t in got.items() if isinstance(t, CompressedTensor)} == want.keys() - {"model.norm.weight"}
    for name, t in got.items():
        plain = t.decompress() if isinstance(t, CompressedTensor) else t
        assert plain.shape == shapes.get(name, want[name].shape) and torch.equal(bits(plain), bits(want[name]))
    with pytest.raises(ValueError, match=r"lm_head.weight has 640 numbers, which cannot be \[3, 3\]"):
        load_dfloat11(folder, shapes={"lm_head.weight": (3, 3)})


def test_shapes_of_a_module(tmp_path):
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(32, 20, bias=False)})
    head = normal(640, torch.bfloat16)
    save_file({f"lm_head.{name}": t for name, t in buffers_of(head).items()}, tmp_path / "x.safetensors")
    got = load_dfloat11(tmp_path / "x.safetensors", config(), shapes=model)
    assert list(got) == ["lm_head.weight"] and got["lm_head.weight"].shape == (20, 32)
    assert torch.equal(bits(got["lm_head.weight"]), bits(head))


def one(tmp_path, buffers: dict[str, Tensor], unit: str = "lm_head.", **more: int) -> Tensor:
    """A file of one unit, loaded."""
    save_file({unit + name: t for name, t in buffers.items()}, tmp_path / "one.safetensors")
    (weight,) = load_dfloat11(tmp_path / "one.safetensors", config(**more)).values()
    return weight


def test_a_last_block_without_codes(tmp_path):
    """Where no code begins in the last block, the encoder leaves its output position out."""
    x = from_exponents([100] * 56 + [101])  # 56 bits and 16: the second block of 64 bits is the end of a code
    buffers = buffers_of(x, {100: 1, 101: 16, END: 16}, 8, 1)
    assert buffers["encoded_exponent"].numel() == 9 and buffers["output_positions"].numel() == 8
    assert torch.equal(bits(one(tmp_path, buffers, threads=1)), bits(x))


def test_unknown_versions_and_configs(checkpoint, tmp_path):
    folder, _ = checkpoint
    with pytest.raises(FormatError, match=r"version 0\.6\.1; this release of fastloss reads 0\.5"):
        load_dfloat11(folder, config(version="0.6.1"))
    with pytest.raises(FormatError, match="no dfloat11_config"):
        load_dfloat11(folder, {"hidden_size": 64})
    with pytest.raises(FormatError, match="names the compressed module 'lm_head'"):
        load_dfloat11(folder, config(pattern_dict={"head": []}))
    with pytest.raises(FormatError, match="no regular expression"):
        load_dfloat11(folder, config(pattern_dict={"(": []}))
    with pytest.raises(FormatError, match=r"bytes_per_thread 4\.\.8, got 512 and 9"):
        load_dfloat11(folder, config(9))
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        load_dfloat11(folder)
    with pytest.raises(FileNotFoundError):
        load_dfloat11(tmp_path / "nothing", config())


def test_damaged_files(tmp_path):
    x = normal(20000, torch.bfloat16)
    sound = buffers_of(x)
    assert torch.equal(bits(one(tmp_path, sound)), bits(x))
    codes = sound["encoded_exponent"]
    wrong_ends = sound["output_positions"].clone()
    wrong_ends[4] += 1
    falling = sound["output_positions"].clone()
    falling[4:8] = 255
    wrong_gaps = sound["gaps"].clone()
    wrong_gaps[320] ^= 0x80  # of the second block's first thread
    damage: dict[str, Tensor | None] = {
        "encoded_exponent": codes[:-1], "sign_mantissa": sound["sign_mantissa"][:-1], "gaps": wrong_gaps,
        "output_positions": wrong_ends, "luts": sound["luts"][:1], "split_positions": torch.tensor([5]),
    }  # fmt: skip
    more: list[tuple[str, Tensor | None]] = [
        ("encoded_exponent", codes[:0]), ("encoded_exponent", codes[:4096]), ("encoded_exponent", codes.to(torch.int16)),
        ("encoded_exponent", torch.cat((codes, codes[:1]))), ("output_positions", falling),
        ("output_positions", sound["output_positions"][:-1]), ("gaps", sound["gaps"][:-8]), ("gaps", None),
        ("luts", sound["luts"][:, :255].contiguous()), ("luts", torch.zeros_like(sound["luts"])),
    ]  # fmt: skip
    for name, t in [*damage.items(), *more]:
        buffers = {k: v for k, v in (sound | {name: t}).items() if v is not None}
        for backend in BACKENDS:
            with pytest.raises(CorruptError), fastloss.use_backend(backend):
                one(tmp_path, buffers)
                pytest.fail(f"{backend} took damaged {name}")
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-100])
    with pytest.raises(CorruptError):
        load_dfloat11(tmp_path / "one.safetensors", config())


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("seed", range(8))
def test_hostile_bytes(seed, at_end):
    """Random bytes in every buffer: no crash, nothing outside is read, and what is found sound is what the codes say."""
    from fastloss.compiled import _C

    if _C is None:
        pytest.skip("the extension is not built")
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, below: int = 256) -> Tensor:
        return torch.randint(0, below, shape, generator=generator).to(torch.uint8)

    for size in (1, 7, 8, 9, 100, 1000):
        threads, numel = 4, 2000
        blocks = -(-size // (8 * threads))
        tables = [random(5, 256), random(18, 256), torch.full((18, 256), 255, dtype=torch.uint8)][seed % 3]
        tables[-1] = random(256, below=[256, 33, 2, 9][seed % 4])
        cuts = torch.randint(0, numel + 1, (blocks + 1,), generator=generator).sort().values.to(torch.int32)
        cuts[0], cuts[-1] = 0, numel
        gaps, codes = random(-(-5 * threads * blocks // 8)), random(size)
        parts = [Guarded(t, at_end) for t in (tables, codes, gaps)]
        other, out = random(numel), torch.full((numel + 128,), -1, dtype=torch.int16)
        bad = _C.dfloat11_decode_cpu(
            luts=parts[0].address, tables=len(tables) - 1, codes=parts[1].address, code_bytes=size,
            sign_mantissa=other.data_ptr(), positions=cuts.data_ptr(), gaps=parts[2].address, numel=numel,
            blocks=blocks, bytes_per_thread=8, threads_per_block=threads, out=out.data_ptr() + 128,
        )  # fmt: skip
        assert -1 <= bad < blocks and (out[:64] == -1).all() and (out[64 + numel :] == -1).all()
        args = (tables, codes, other, cuts.view(torch.uint8), gaps, numel, 8, threads)
        with fastloss.use_backend("reference"):
            want, want_bad = registry.run("dfloat11_decode_checked", *args)
        if want_bad == -1:
            assert bad == -1 and torch.equal(bits(out[64:-64]), bits(want))


def test_arguments():
    buffers = buffers_of(normal(100, torch.bfloat16))
    names = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
    good = *(buffers[name] for name in names), 100, 8, 512
    op = torch.ops.fastloss.dfloat11_decode
    assert op(*good).shape == (100,)
    for i, (wrong, error, words) in enumerate([
        (good[0][:, :9], ValueError, "luts must be"), (good[1].short(), TypeError, "codes must be uint8"),
        (good[2][1:], ValueError, "sign_mantissa must have 100"), (good[3][4:], ValueError, "output_positions must be 8"),
        (good[4][:10], ValueError, "too few"), (-1, ValueError, "must have -1"), (3, ValueError, "must be 4..8"),
        (0, ValueError, "1..1024"),
    ]):  # fmt: skip
        with pytest.raises(error, match=words):
            op(*good[:i], wrong, *good[i + 1 :])
