"""Train one language model three ways and compare the losses, the time and the memory of the head.

    python examples/language_model.py            # a few minutes on two CPU cores; a GPU is used where there is one
    python examples/language_model.py --help

The text is the source of Python's standard library, cut into words. The three ways start from the same weights, see the
same batches and differ in one line, `loss_of`. Then one step with a vocabulary so large that the logits of plain PyTorch
do not fit into a memory limit.
"""

from __future__ import annotations

import argparse
import array
import concurrent.futures
import copy
import itertools
import json
import math
import multiprocessing
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

try:  # pip install 'fastloss[demo]'; without it the same words in plain text, and no picture
    import rich.box
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table

    CONSOLE: Any = rich.console.Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
except ImportError:
    CONSOLE = None

PLAIN = "nn.Linear + CrossEntropyLoss"
CHUNKED = "torch linear_cross_entropy"
FASTLOSS = "fastloss.linear_cross_entropy"
WAYS = [PLAIN, *([CHUNKED] if hasattr(nn, "LinearCrossEntropyOptions") else []), FASTLOSS]
COLOURS = {PLAIN: "#b9bec7", CHUNKED: "#e39b3b", FASTLOSS: "#2563b0"}
MIB = 2**20
Curves = dict[str, list[float]]  # one number a step, for each way


def loss_of(way: str, head: nn.Linear, x: Tensor, target: Tensor, most: int | None = None) -> Tensor:
    """The one line in which the ways differ. most: bytes of logits that may be held at a time, where that can be said."""
    if way == PLAIN:
        return nn.CrossEntropyLoss()(head(x), target)
    if way == CHUNKED:  # its own choice of chunks is a few rows on a CPU, and very slow
        rows = most // (head.out_features * x.element_size()) if most else len(x) // 8
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, rows))
        return F.linear_cross_entropy(x, head.weight, target, options=options)
    return fastloss.linear_cross_entropy(x, head.weight, target, max_extra_bytes=most)


class LanguageModel(nn.Module):
    """A two-layer transformer; the head shares its weight with the embedding."""

    def __init__(self, vocab: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Features [B * T, width] of token ids [B, T]; the logits are the head's business."""
        x = self.tokens(ids) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device, dtype=x.dtype)
        return self.body(x, mask=mask, is_causal=True).flatten(0, 1)


def read_text(vocab: int) -> tuple[Tensor, int, int]:
    """(token ids by falling frequency, the last id being <unk>; size of the vocabulary; files read).

    Words keep the space or dot before them, so that names, `.names` and punctuation are tokens of their own. The tests of
    the standard library are read only if the rest does not hold enough different tokens.
    """
    word = re.compile(r"[ .]?\w+|[^\w\s]+|\s+")
    root = Path(sysconfig.get_path("stdlib"))
    sources = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts)]
    sources.sort(key=lambda p: ("test" in str(p.relative_to(root)), p))
    number: dict[str, int] = {}
    stream = array.array("l")
    files = 0
    for source in sources:
        for token in word.findall(source.read_text(encoding="utf-8", errors="replace")):
            stream.append(number.setdefault(token, len(number)))
        files += 1
        if len(number) >= 1.25 * vocab:
            break
    if not stream:
        raise SystemExit(f"no Python source found under {root}: nothing to train on")
    ids = torch.tensor(stream, dtype=torch.int64)
    rank = torch.empty(len(number), dtype=torch.int64)
    rank[torch.bincount(ids).argsort(descending=True, stable=True)] = torch.arange(len(number))
    size = min(vocab, len(number) + 1)
    return rank[ids].clamp_(max=size - 1), size, files


def train(text: Tensor, vocab: int, o: argparse.Namespace, tick: Callable[[str], None]) -> tuple[Curves, Curves]:
    """(losses, ms of each step) of every way. The ways take turns at every step, so that a busy machine slows all alike."""
    torch.manual_seed(o.seed)
    first = LanguageModel(vocab, o.width, o.context).to(o.device, o.dtype)
    models = {way: copy.deepcopy(first) for way in WAYS}
    optimizers = {way: torch.optim.AdamW(m.parameters(), lr=2e-3) for way, m in models.items()}
    losses: Curves = {way: [] for way in WAYS}
    times: Curves = {way: [] for way in WAYS}
    start_of_all = time.perf_counter()
    for step in range(o.steps):
        starts = torch.randint(len(text) - o.context - 1, (o.batch,)).tolist()
        batch = torch.stack([text[s : s + o.context + 1] for s in starts]).to(o.device)
        ids, target = batch[:, :-1], batch[:, 1:].flatten()
        for way, model in models.items():
            start = time.perf_counter()
            loss = loss_of(way, model.head, model(ids), target)
            loss.backward()
            optimizers[way].step()
            optimizers[way].zero_grad()
            losses[way].append(loss.item())  # waits for the device, too
            times[way].append(1e3 * (time.perf_counter() - start))
            tick(f"step {step + 1}: {way}")
        if time.perf_counter() - start_of_all > o.seconds:
            break
    return losses, times


def status_bytes(field: str) -> int:
    """A line of /proc/self/status; VmHWM is the peak of resident memory, VmRSS what is resident now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Sets VmHWM back to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(work: Callable[[], Any], device: str) -> float:
    """Bytes that `work` holds at its peak beyond what was there before; nan where this system cannot tell."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        forget_peak()
        before = status_bytes("VmRSS")
    except OSError:
        work()
        return math.nan
    work()
    return status_bytes("VmHWM") - before


def head_memory(way: str, vocab: int, o: argparse.Namespace) -> float:
    """Peak extra bytes of one forward and backward of the head alone, its gradients included."""
    torch.manual_seed(o.seed)
    head = nn.Linear(o.width, vocab, bias=False, device=o.device, dtype=o.dtype)
    x = torch.randn(o.batch * o.context, o.width, device=o.device, dtype=o.dtype, requires_grad=True)
    target = torch.randint(vocab, (len(x),), device=o.device)
    small = nn.Linear(o.width, 64, bias=False, device=o.device, dtype=o.dtype)  # libraries set themselves up once
    loss_of(way, small, x, target % 64).backward()
    x.grad = None
    return peak_of(lambda: loss_of(way, head, x, target).backward(), o.device)


def step_within(way: str, o: argparse.Namespace) -> dict[str, Any]:
    """One whole training step at the large vocabulary under a hard memory limit: its loss and peak, or why it failed."""
    torch.manual_seed(o.seed)
    limit = o.limit * MIB
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    else:
        import resource

        forget_peak()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    try:
        model = LanguageModel(o.large_vocab, o.width, o.context).to(o.device, o.dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(o.large_vocab, (o.large_rows // o.context, o.context), device=o.device)
        loss = loss_of(way, model.head, model(ids), ids.roll(-1, 1).flatten(), most=limit // 8)
        loss.backward()
        optimizer.step()
        result: dict[str, Any] = {"loss": loss.item()}
    except (RuntimeError, MemoryError) as error:
        result = {"failed": str(error).splitlines()[0] if str(error) else type(error).__name__}
    peak = torch.cuda.max_memory_allocated() if o.device == "cuda" else status_bytes("VmHWM")
    return result | {"peak_bytes": peak, "seconds": time.perf_counter() - start}


def measure(way: str, vocab: int, o: argparse.Namespace) -> tuple[float, dict[str, Any] | None]:
    """The memory of the head, and the step under the limit where a limit can be set."""
    can_limit = o.device == "cuda" or platform.system() == "Linux"
    return head_memory(way, vocab, o), step_within(way, o) if can_limit else None


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the function, called where nothing was allocated before."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call when a piece of work is done, with its name."""
    if CONSOLE and CONSOLE.is_terminal:
        columns = ("{task.description:45s}", rich.progress.BarColumn(), rich.progress.TaskProgressColumn())
        with rich.progress.Progress(
            *columns, rich.progress.TimeElapsedColumn(), console=CONSOLE, transient=True
        ) as bar:
            task = bar.add_task("reading", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)
        return
    done, said = itertools.count(1), [0.0]

    def line(name: str) -> None:
        k = next(done)
        if time.monotonic() > said[0] + 5:  # a line every few seconds is enough for a log
            said[0] = time.monotonic()
            print(f"[{k}/{total}] {name}", flush=True)

    yield line


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    if CONSOLE:
        table = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
        for k, name in enumerate(header):
            table.add_column(name, justify="right" if k else "left", no_wrap=not k)
        for row in rows:
            table.add_row(*map(rich.markup.escape, row))
        CONSOLE.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def report_training(o: argparse.Namespace, losses: Curves, times: Curves, memory: dict[str, float]) -> float:
    """Prints the comparison; returns the largest difference of a loss from PyTorch's at any step."""
    steps = len(losses[PLAIN])
    print(f"{steps} steps of {o.batch} x {o.context} tokens, {o.dtype} on {o.device}, every way from seed {o.seed}.")
    if steps < o.steps:
        print(f"Stopped after {steps} of {o.steps} steps, every way alike: --seconds {o.seconds:g} were over.")
    print("Median ms a step; head memory: the peak that a forward and backward of the head add, gradients included.")
    if CHUNKED in WAYS:
        print(f"torch's linear_cross_entropy is given chunks of {max(1, o.batch * o.context // 8)} rows.")
    rows = []
    for way in WAYS:
        known = not math.isnan(memory[way])
        rows.append([
            way, f"{losses[way][-1]:.5f}", f"{statistics.median(times[way]):.0f}",
            f"{memory[way] / MIB:.1f} MiB" if known else "unknown here",
            f"{memory[PLAIN] / memory[way]:.1f}x" if known else "",
        ])  # fmt: skip
    show("Training", ["way", "final loss", "ms a step", "head memory", "ratio"], rows)
    differences = {way: max(abs(a - b) for a, b in zip(losses[way], losses[PLAIN], strict=True)) for way in WAYS[1:]}
    for way, difference in differences.items():
        allowed = 1e-3 if o.dtype == torch.float32 else 0.125  # a bfloat16 loss near 10 moves in steps of 1/16
        verdict = "overlays" if difference <= allowed else "LEAVES"
        print(f"{way}: the loss curve {verdict} PyTorch's; largest difference at any step {difference:.2g}")
    return max(differences.values())


def report_large(o: argparse.Namespace, large: dict[str, dict[str, Any]]) -> None:
    """Prints who fitted into the limit."""
    logits = o.large_rows * o.large_vocab * o.dtype.itemsize
    print(f"\nOne step with a vocabulary of {o.large_vocab:,}: its logits alone would take {logits / MIB:.0f} MiB.")
    if not large:
        print(f"{platform.system()} has no memory limit that PyTorch's allocator respects: this part is left out.")
        return
    rows = []
    for way, r in large.items():
        why = "OUT OF MEMORY" if "memory" in r.get("failed", "") else "FAILED"
        result = why if "failed" in r else f"loss {r['loss']:.4f}"
        rows.append([way, result, f"{r['peak_bytes'] / MIB:.0f} MiB", f"{r['seconds']:.1f}"])
    title = f"A whole training step of {o.large_rows} tokens in {o.limit} MiB"
    show(title, ["way", "result", "peak memory", "seconds"], rows)
    for way, r in large.items():
        if "failed" in r:
            print(f"{way}: {r['failed']}")


def draw_large(axes: Any, names: list[str], o: argparse.Namespace, large: dict[str, dict[str, Any]]) -> None:
    """Peak of each process under the limit; hatched up to it where the step failed."""
    for k, (way, r) in enumerate(large.items()):
        failed = "failed" in r
        height = o.limit if failed else r["peak_bytes"] / MIB
        looks = {"hatch": "///", "alpha": 0.6} if failed else {}
        axes.bar(names[k], height, color=COLOURS[way], edgecolor="white", **looks)
        if failed:
            axes.text(k, height / 2, "out of\nmemory", ha="center", va="center", weight="bold")
        else:
            axes.text(k, height, f"{height:.0f}", ha="center", va="bottom")
    axes.axhline(o.limit, color="#b91c1c", lw=1.5)
    axes.text(len(large) - 0.5, o.limit, f"limit {o.limit} MiB", color="#b91c1c", ha="right", va="bottom")
    axes.set(title=f"A step, vocabulary {o.large_vocab:,}", ylabel="peak of the process, MiB", ylim=(0, 1.1 * o.limit))


def draw(
    path: Path, o: argparse.Namespace, losses: Curves, memory: dict[str, float], large: dict, apart: float
) -> bool:
    """Loss curves, memory of the head, and who fitted into the limit; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with pyplot.rc_context(style):
        figure, (curves, bars, fits) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), width_ratios=(1.5, 1, 1))
        looks: dict[str, Any] = {PLAIN: {"lw": 7}, CHUNKED: {"lw": 3.5}, FASTLOSS: {"lw": 1.6, "ls": "--"}}
        for way, values in losses.items():
            curves.plot(range(1, len(values) + 1), values, color=COLOURS[way], label=way, **looks[way])
        curves.set(title=f"Training loss (largest difference {apart:.1g})", xlabel="step", ylabel="cross entropy")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.legend(frameon=False)
        short = {PLAIN: "Linear +\nCrossEntropy", CHUNKED: "torch\nchunked", FASTLOSS: "fastloss"}
        names = [short[way] for way in memory]
        drawn = bars.bar(names, [b / MIB for b in memory.values()], color=[COLOURS[way] for way in memory])
        bars.bar_label(drawn, fmt="%.0f", padding=2)
        bars.margins(y=0.12)
        bars.set(title="Head: peak extra memory", ylabel="MiB")
        if large:
            draw_large(fits, [short[way] for way in large], o, large)
        else:
            fits.set_axis_off()
        figure.tight_layout()
        figure.savefig(path, dpi=130)
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations"
    )
    parser.add_argument("--vocab", type=int, default=50_257, help="tokens of the vocabulary (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="training steps of every way (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=120, help="stop training then, all ways alike (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, help="sequences a step (default: 8 on a CPU, 64 on a GPU)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="features (default: %(default)s)")
    parser.add_argument("--large-vocab", type=int, default=262_144, help="of the last part (default: %(default)s)")
    parser.add_argument("--large-rows", type=int, default=4096, help="tokens of its one step (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=4096, help="its memory limit in MiB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder of the results (default: %(default)s)"
    )
    o = parser.parse_args()
    for name in ("vocab", "steps", "batch", "context", "width", "large_vocab", "large_rows", "limit"):
        if (value := getattr(o, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    o.dtype = getattr(torch, o.dtype)
    o.batch = o.batch or (64 if o.device == "cuda" else 8)
    o.large_rows -= o.large_rows % o.context
    return o


def main() -> None:
    o = arguments()
    start = time.perf_counter()
    memory: dict[str, float] = {}
    large: dict[str, dict[str, Any]] = {}
    with progress(1 + len(WAYS) * (o.steps + 1)) as tick:
        text, vocab, files = read_text(o.vocab)
        tick("text")
        losses, times = train(text, vocab, o, tick)
        for way in WAYS:
            memory[way], step = in_fresh_process(measure, way, vocab, o)
            large |= {way: step} if step else {}
            tick(f"memory: {way}")

    unknown = (text == vocab - 1).float().mean()
    print(
        f"{len(text):,} tokens from {files} files of Python's standard library; {vocab:,} different, {unknown:.1%} <unk>."
    )
    apart = report_training(o, losses, times, memory)
    report_large(o, large)

    o.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(o).items()}
    results = {
        "settings": settings, "vocab": vocab, "losses": losses, "ms": times, "head_bytes": memory,
        "largest_difference": apart, "large": large,
    }  # fmt: skip
    (o.out / "language_model.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn = draw(o.out / "language_model.png", o, losses, memory, large, apart)
    print(f"\nWritten to {o.out}: language_model.json" + (" and language_model.png" if drawn else ""))
    print(f"{time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
