"""The catalogue of losses: what `row_loss` knows about a loss, and what docs/losses.md is generated from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Statistics = tuple[str, ...] | Callable[..., tuple[str, ...]]
Temperature = str | float | Callable[..., Any] | None  # the name of a parameter, a constant, or a function of them


@dataclass(frozen=True)
class Entry:
    """One loss: its function, and the sentences about it."""

    name: str
    function: Callable[..., Any]
    formula: str
    gradient: str
    source: str
    published: str
    statistics: Statistics
    rows: bool
    temperature: Temperature
    engine: Callable[..., Mapping[str, Any]] | None = None
    combination: Callable[..., tuple[float, float]] | None = None
    accepted: tuple[str, ...] = field(init=False)  # names of the parameters after the statistics
    _defaults: tuple[tuple[str, Any], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Look at the signature once: it takes microseconds, and torch.compile may not be able to."""
        found = list(inspect.signature(self.function).parameters.values())
        names = tuple(p.name for p in found[1:] if p.kind is not p.VAR_KEYWORD)
        defaults = tuple((p.name, p.default) for p in found if p.default is not p.empty)
        object.__setattr__(self, "accepted", names)
        object.__setattr__(self, "_defaults", defaults)

    def needs(self, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the statistics that the loss reads with these parameters, besides target logit and rest."""
        return self.statistics(**parameters) if callable(self.statistics) else self.statistics

    def temperature_of(self, parameters: Mapping[str, Any]) -> Any:
        """The temperature of the statistics that the loss reads with these parameters, None for none."""
        if isinstance(self.temperature, str):
            return parameters[self.temperature]
        return self.temperature(**parameters) if callable(self.temperature) else self.temperature

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise TypeError for a keyword parameter that has no default and was not given."""
        missing = [name for name in self.accepted if name not in parameters]
        if missing:
            raise TypeError(f"{self.name} needs {', '.join(missing)}")

    @property
    def defaults(self) -> dict[str, Any]:
        """Keyword parameters and their defaults."""
        return dict(self._defaults)


_entries: dict[str, Entry] = {}
_by_function: dict[Callable[..., Any], Entry] = {}


def _register(entry: Entry) -> None:
    if entry.name in _entries and _entries[entry.name].function.__module__ != entry.function.__module__:
        raise ValueError(f"two losses are named {entry.name!r}: in {entry.function.__module__} and elsewhere")
    _entries[entry.name] = _by_function[entry.function] = entry


def row(
    *, formula: str, gradient: str, source: str, statistics: Statistics = (), temperature: Temperature = None,
    published: str = "", engine: Callable[..., Mapping[str, Any]] | None = None,
    combination: Callable[..., tuple[float, float]] | None = None,
) -> Callable[[Function], Function]:  # fmt: skip
    """Register a row loss: a function of `RowStats` (first argument) and keyword parameters, one value a row.

    statistics: the names to ask `row_stats` for besides the target logit and the LSE of the rest; a function of the
    loss's keyword parameters where they depend on them. temperature: that of the statistics: the name of the parameter
    that is it, a number, or a function of the keyword parameters. engine: from the keyword parameters, further arguments
    of `row_stats` (a term). combination: from the keyword parameters, the numbers (A, B) of a loss that is A (-log p_y) +
    B term, so that its gradient can be made right after the term. published: what the published code gets wrong and what
    is done here instead.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        _register(
            Entry(
                name, function, formula, gradient, source, published, statistics, True, temperature, engine, combination
            )
        )
        return function

    return register


def entry(
    *, formula: str, gradient: str, source: str, statistics: Statistics = (), published: str = ""
) -> Callable[[Function], Function]:
    """Register any other loss or helper (of sequences, regions, per-sample losses): returned unchanged."""

    def register(function: Function) -> Function:
        name = function.__name__
        _register(Entry(name, function, formula, gradient, source, published, statistics, False, None))
        return function

    return register


def find(function: Callable[..., Any]) -> Entry | None:
    """The entry of a registered function, or None: a user's own."""
    return _by_function.get(function)


def combination(loss: Callable[..., Any], own: Mapping[str, Any]) -> tuple[float, float] | None:
    """(A, B) of a registered loss A (-log p_y) + B term with these arguments; None for any other loss."""
    known = find(loss)
    if known is None or known.combination is None or any(isinstance(value, Tensor) for value in own.values()):
        return None
    return known.combination(**{**known.defaults, **own})


def entries() -> tuple[Entry, ...]:
    """All entries, by name."""
    return tuple(_entries[name] for name in sorted(_entries))


def _accepted(loss: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a user's own loss after the first, which is the statistics."""
    if torch.compiler.is_compiling():  # which cannot trace inspect.signature of a function made inside
        code = loss.__code__
        return tuple(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return tuple(inspect.signature(loss).parameters)[1:]


def split_arguments(loss: Callable[..., Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the loss, arguments of the statistics) from what `row_loss` was given."""
    known = find(loss)
    accepted = _accepted(loss) if known is None else known.accepted
    own = {name: value for name, value in given.items() if name in accepted}
    engine = {name: value for name, value in given.items() if name not in accepted}
    if known is not None:
        parameters = {**known.defaults, **own}
        known.check(parameters)
        asked = engine.get("stats", ())
        asked = (asked,) if isinstance(asked, str) else tuple(asked)
        engine["stats"] = tuple(dict.fromkeys((*known.needs(parameters), *asked)))
        made = {} if known.engine is None else dict(known.engine(**parameters))
        if known.temperature is not None:
            made["temperature"] = known.temperature_of(parameters)
        if twice := sorted(engine.keys() & made.keys()):
            raise TypeError(f"{known.name} sets {', '.join(twice)} of its statistics by itself: leave it out")
        engine |= made
    return own, engine
