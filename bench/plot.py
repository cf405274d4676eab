"""Draw the README's plots: `python bench/plot.py bench/results/MACHINE/RUN.json ...` writes SVG files into docs/img/.

One file for time and one for memory each machine. Written by hand rather than by matplotlib: a few kilobytes that diff well
and follow the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "img"
WIDTH, LEFT, RIGHT, BAR, GAP, TITLE = 820, 150, 190, 18, 5, 30
#: What a bar is called in a plot, in the order of the bars.
LABELS = {
    "gemms": "three GEMMs alone", "four_gemms": "four GEMMs alone", "copy": "copy of the bytes", "torch": "torch eager",
    "torch_compile": "torch.compile", "torch_chunked": "torch chunked", "liger": "Liger", "cce": "CCE", "quack": "QuACK",
}  # fmt: skip
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.o{fill:#1a7f64}.p{fill:#afb8c1}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.o{fill:#2ea98a}.p{fill:#57606a}}"
)


class Bar(NamedTuple):
    label: str
    value: float
    text: str
    ours: bool


class Panel(NamedTuple):
    title: str
    bars: list[Bar]


def label(name: str) -> str:
    return name.replace("fastloss-", "fastloss ") if name.startswith("fastloss") else LABELS.get(name, name)


def ordered(names: Any) -> list[str]:
    """Ours first, then the others as LABELS has them."""
    rank = {name: i for i, name in enumerate(LABELS)}
    return sorted(names, key=lambda n: (not n.startswith("fastloss"), rank.get(n, len(rank)), n))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def time_panel(record: dict[str, Any]) -> Panel:
    """Median time of each implementation; behind it how many times faster ours is."""
    info = record["extra_info"]
    bars = []
    for name in ordered(info["implementations"]):
        seconds = info["implementations"][name]["median"]
        ratio = info["ratios"].get(name, {}).get("median")
        text = _time(seconds) + (f"  ({1 / ratio:.2f}x ours)" if ratio else "")
        bars.append(Bar(label(name), seconds, text, name == info["impl"]))
    return Panel(record["group"], bars)


def memory_panel(record: dict[str, Any]) -> Panel:
    """Peak bytes of one call beyond its gradients."""
    info = record["extra_info"]
    beyond = {name: max(0, peak - info["gradient_bytes"]) for name, peak in info["peaks"].items()}
    bars = [Bar(label(n), beyond[n], _bytes(beyond[n]), n == info["impl"]) for n in ordered(beyond)]
    return Panel(f"{record['group']}: peak memory beyond the gradients", bars)


def svg(panels: list[Panel], caption: str) -> str:
    """Panels of horizontal bars, one below the other, each to its own scale."""
    parts, y = [], 10
    room = WIDTH - LEFT - RIGHT
    for panel in panels:
        y += TITLE
        parts.append(f'<text class="t" x="8" y="{y - 10}">{escape(panel.title)}</text>')
        largest = max((bar.value for bar in panel.bars), default=0) or 1
        for bar in panel.bars:
            length = max(1.0, room * bar.value / largest)
            parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>')
            parts.append(
                f'<rect class="{"o" if bar.ours else "p"}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
            )
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{escape(bar.text)}</text>')
            y += BAR + GAP
    y += 24
    parts.append(f'<text x="8" y="{y - 6}" opacity="0.7">{escape(caption)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def draw(path: Path, folder: Path) -> list[Path]:
    """The plots of one run."""
    run = json.loads(path.read_text())
    info = run["machine_info"]
    where = (info.get("gpu") or {}).get("name") or info["cpu"]["brand_raw"]
    threads = "" if info.get("gpu") else f", {info['threads']} threads"
    caption = f"{where}{threads}, torch {info['torch']}; interleaved medians; {path.parent.name}/{path.name}"
    records = [r for r in run["benchmarks"] if r["extra_info"].get("ratios") is not None]
    main = [r for r in records if "forward+backward" in r["group"] and "peaked" in r["group"]]
    plots = {
        "time": [time_panel(r) for r in main],
        "memory": [memory_panel(r) for r in main if r["extra_info"].get("peaks")],
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, panels in plots.items():
        if panels:
            written.append(folder / f"{info['name']}-{kind}.svg")
            written[-1].write_text(svg(panels, caption))
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    for path in options.json:
        for image in draw(path, options.out):
            print(image)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
