"""Peak memory of contrastive losses for growing batches: `python bench/pairs_memory.py`.

A call is forward and backward of one loss on float32 embeddings of B pairs; counted is what is resident at the peak beyond
what was there before, the two gradients included, in a process of its own that is held to --limit. CLIP: B x B, against
open_clip. NT-Xent of 2 B rows: 2 B x 2 B, against lightly and pytorch-metric-learning. In-batch negatives of one direction:
sentence-transformers (with transformers). Who is not installed is left out. Prints a table, writes a JSON file into
bench/results/ and, with --plot, docs/img/pairs_memory.svg.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastloss
from common import RESULTS, clock, cpu_model, machine
from device_plan import commit
from memory import FRESH_MEMORY, peak_of_process

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "img" / "pairs_memory.svg"
SIZES = tuple(2**n for n in range(7, 17))
SCALE = 20.0
Loss = Callable[[Tensor, Tensor], Tensor]


def clip() -> Loss:
    """Ours, both directions."""
    return lambda q, k: fastloss.contrastive.clip_loss(q, k, SCALE)


def open_clip() -> Loss:
    """The class itself, from its file: the package needs torchvision, the loss does not."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ImportError("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss, scale = module.ClipLoss(), torch.tensor(SCALE)
    return lambda q, k: loss(q, k, scale)


def ntxent() -> Loss:
    """Ours, of both views together."""

    def loss(q: Tensor, k: Tensor) -> Tensor:
        n = len(q)
        stats = fastloss.pair_stats(
            torch.cat((q, k)), positive=fastloss.Diagonal(n, -n), scale=SCALE, normalize=True, columns=False
        )
        return stats.nll.mean()

    return loss


def lightly() -> Loss:
    """lightly's NTXentLoss. Its packages import torchvision for their models; the loss does not need it."""
    package = importlib.util.find_spec("lightly")
    if package is None or package.origin is None:
        raise ImportError("lightly is not installed")
    if importlib.util.find_spec("torchvision") is None:
        root = Path(package.origin).parent
        for name, path in (("loss", "loss"), ("models", "models"), ("models.modules", "models/modules")):
            sys.modules[f"lightly.{name}"] = parent = types.ModuleType(f"lightly.{name}")  # without its __init__.py
            parent.__path__ = [str(root / path)]
        ops = types.ModuleType("torchvision.ops")
        ops.StochasticDepth = torch.nn.Identity  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": types.ModuleType("torchvision"), "torchvision.ops": ops}
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return NTXentLoss(temperature=1 / SCALE)


def metric_learning() -> Loss:
    """pytorch-metric-learning's, with a label for each pair."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=1 / SCALE)
    return lambda q, k: loss(torch.cat((q, k)), torch.arange(len(q)).repeat(2))


def sentence_transformers() -> Loss:
    """MultipleNegativesRankingLoss of embeddings that exist."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=SCALE)
    return lambda q, k: loss.compute_loss_from_embeddings([q, k], torch.empty(0))


#: Name -> (how to make the loss, its label, ours).
PEERS: dict[str, tuple[Callable[[], Loss], str, bool]] = {
    "fastloss-clip": (clip, "fastloss, CLIP", True),
    "open_clip": (open_clip, "open_clip, CLIP", False),
    "sentence_transformers": (sentence_transformers, "sentence-transformers, MNRL", False),
    "fastloss-ntxent": (ntxent, "fastloss, NT-Xent", True),
    "lightly": (lightly, "lightly, NT-Xent", False),
    "metric_learning": (metric_learning, "pytorch-metric-learning, NT-Xent", False),
}  # fmt: skip


def one(name: str, batch: int, features: int, limit: int) -> dict[str, Any]:
    """The peak of one call in this process, which may not take more than `limit` bytes beyond what it has."""
    loss = PEERS[name][0]()

    def call(pairs: int) -> Callable[[], object]:
        torch.manual_seed(0)
        q, k = (torch.nn.functional.normalize(torch.randn(pairs, features)).requires_grad_() for _ in range(2))
        return lambda: torch.autograd.grad(loss(q, k), (q, k))

    settle, measured = call(64), call(batch)
    settle()
    here = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (here + limit, here + limit))
    start = clock()
    peak = peak_of_process(measured, lambda: None)
    return {"peak_bytes": peak, "seconds": round(clock() - start, 3)}


def measure(names: list[str], sizes: list[int], features: int, limit: int, seconds: float) -> list[dict[str, Any]]:
    """A record for each loss and size; one that fails is not tried at larger sizes."""
    records = []
    environment = {**os.environ, "GLIBC_TUNABLES": FRESH_MEMORY, "FASTLOSS_KEEP_BYTES": "0"}
    for name in names:
        for batch in sizes:
            request = ["--one", name, "--sizes", str(batch), "--features", str(features), "--limit", str(limit / 2**30)]
            record: dict[str, Any] = {"loss": name, "batch": batch}
            try:
                done = subprocess.run(
                    [sys.executable, __file__, *request],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=seconds,
                )
                said = done.stdout if done.returncode == 0 else (done.stderr.strip() or "killed").splitlines()[-1][:200]
                record |= json.loads(said) if done.returncode == 0 else {"failed": said}
            except subprocess.TimeoutExpired:
                record["failed"] = f"took more than {seconds:.0f} s"
            records.append(record)
            print(record, file=sys.stderr, flush=True)
            if "failed" in record:
                break
    return records


def _mib(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    return f"{record['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in record else "failed"


def table(run: dict[str, Any]) -> str:
    """Peak MiB, a row for each batch."""
    names = list(dict.fromkeys(r["loss"] for r in run["records"]))
    cells = {(r["loss"], r["batch"]): r for r in run["records"]}
    sizes = sorted({r["batch"] for r in run["records"]})
    lines = ["peak MiB".rjust(10) + "".join(f"{name:>24}" for name in names)]
    lines += [f"{size:>10,}" + "".join(f"{_mib(cells.get((name, size))):>24}" for name in names) for size in sizes]
    return "\n".join(lines)


def plot(run: dict[str, Any], path: Path) -> None:
    """Peak over batch, both axes logarithmic; a cross where a loss left the limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastloss", "svg.fonttype": "none", "font.family": "sans-serif"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4))
    greys = iter(("#8b949e", "#57606a", "#b08800", "#a475c9"))
    greens = iter(("#1a7f64", "#2ea98a"))
    for name in dict.fromkeys(r["loss"] for r in run["records"]):
        _, label, ours = PEERS[name]
        color, style = next(greens if ours else greys), "--" if "NT-Xent" in label else "-"
        known = [r for r in run["records"] if r["loss"] == name and "peak_bytes" in r]
        if not known:
            continue
        x, y = [r["batch"] for r in known], [max(r["peak_bytes"] / 2**20, 0.1) for r in known]
        axes.plot(x, y, "o" + style, label=label, color=color, markersize=4)
        out = [r for r in run["records"] if r["loss"] == name and "emory" in r.get("failed", "")]
        axes.plot([r["batch"] for r in out], [run["limit"] / 2**20] * len(out), "x", color=color)
    axes.axhline(run["limit"] / 2**20, color="#d0d7de", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="pairs in a batch", ylabel="peak MiB of forward and backward")
    sizes = sorted({r["batch"] for r in run["records"]})
    axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"{run['features']} features, float32, gradients included; x: beyond {run['limit'] / 2**30:.0f} GiB", fontsize=9
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--losses", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that a process may take")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one call may take")
    parser.add_argument("--one", choices=PEERS, help="only this loss, in this process")
    parser.add_argument(
        "--out", type=Path, help="the JSON file; default: bench/results/MACHINE/pairs_memory/DATE-COMMIT.json"
    )
    parser.add_argument("--with", dest="others", type=Path, help="an earlier JSON whose losses, not measured now, stay")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=IMAGE, help="also draw; default docs/img/pairs_memory.svg"
    )
    options = parser.parse_args(arguments)
    limit = int(options.limit * 2**30)
    if options.one:
        print(json.dumps(one(options.one, options.sizes[0], options.features, limit)))
        return 0
    records = measure(options.losses, sorted(options.sizes), options.features, limit, options.timeout)
    if options.others:
        earlier = json.loads(options.others.read_text())
        kept = [r for r in earlier["records"] if r["loss"] not in options.losses]
        records = [{"commit": earlier["commit"], **r} for r in kept] + records
        records.sort(key=lambda r: list(PEERS).index(r["loss"]))
    now = datetime.datetime.now(datetime.timezone.utc)
    run = {
        "features": options.features, "dtype": "float32", "limit": limit, "records": records,
        "machine": {"name": machine(), "cpu": cpu_model(), "threads": torch.get_num_threads()},
        "torch": torch.__version__, "commit": commit(), "datetime": now.isoformat(timespec="seconds"),
    }  # fmt: skip
    path = options.out or RESULTS / machine() / "pairs_memory" / f"{now:%Y-%m-%d}-{commit()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run))
    print(path)
    if options.plot:
        plot(run, options.plot)
        print(options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
