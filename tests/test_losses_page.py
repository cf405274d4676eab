"""docs/losses.md is what the catalogue says, and the catalogue is complete."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fastloss
from fastloss import contrastive, losses
from fastloss.losses import catalogue

DOCS = Path(__file__).parents[1] / "docs"


def test_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("losses_page", DOCS / "losses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "losses.md").read_text() == module.page(), "run python docs/losses.py"


def test_every_entry_is_exported_and_described() -> None:
    for e in catalogue.entries():
        home = contrastive if e.function.__module__.startswith("fastloss.contrastive") else losses
        assert getattr(home, e.name) is e.function, e.name
        assert e.formula and e.gradient and e.source, e.name
        assert e.function.__doc__, e.name
        assert e.name in home.__all__


def test_a_loss_of_ones_own_needs_no_entry() -> None:
    assert catalogue.find(lambda s: s.nll) is None
    assert catalogue.find(fastloss.losses.forward_kl) is not None
