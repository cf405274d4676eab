"""The reinforcement learning example at tiny settings: the reward goes up, and what counts as a token is right."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "grpo.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward_goes_up() -> None:
    command = [sys.executable, str(EXAMPLE), *"--device cpu --steps 25 --prompts 8 --group 16".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+) in", done.stdout)
    assert found, done.stdout
    first, last = map(float, found.groups())
    assert first < 0.25 and last > 0.45, done.stdout


def test_reward_and_targets() -> None:
    """Digits 3 1 4 =, and completions that are right, too long, and too short."""
    example = load()
    ids = torch.tensor(
        [[3, 1, 4, 10, 3, 1, 4, 11, 11], [3, 1, 4, 10, 3, 1, 4, 4, 11], [3, 1, 4, 10, 3, 11, 11, 11, 11]]
    )
    assert example.reward_of(ids).tolist() == pytest.approx([1.0, 0.75, 0.5])
    off = [-100] * 4
    assert example.targets_of(ids).tolist() == [
        [*off, 3, 1, 4, 11, -100], [*off, 3, 1, 4, 4, 11], [*off, 3, 11, -100, -100, -100],
    ]  # fmt: skip


def test_help_and_refusals() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "--width", "6"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--width must be a multiple of 4" in done.stderr
