"""The compiled extension `_C`, or None and the reason why it is not there."""

from __future__ import annotations

from types import ModuleType

_C: ModuleType | None
try:
    from . import _C  # type: ignore[no-redef]

    MISSING: str | None = None
except ImportError as error:  # a pure-Python install works; explain() and info say what is missing
    _C, MISSING = None, f"the compiled extension is missing ({error}); reinstall with a C++17 compiler on PATH"
