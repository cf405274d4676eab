"""Write docs/losses.md from the catalogue of losses: `python docs/losses.py` (tests check that it is up to date)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastloss.losses.catalogue import Entry, entries

HEAD = """# Losses

Written by `python docs/losses.py` from the catalogue (`fastloss.losses.catalogue`): do not edit.

A row loss maps statistics to one value a row. The same function serves logits, linear heads and modules:

```python
fastloss.row_loss(logits, target, losses.focal, gamma=3.0)                       # [..., V] logits
fastloss.linear_row_loss(hidden, head.weight, target, losses.focal, gamma=3.0)   # the logits are never stored
fastloss.nn.RowLoss(losses.focal, gamma=3.0, reduction="sum")                    # nn.LinearRowLoss for heads
fastloss.linear_row_loss(hidden, head.weight, target, lambda s: (1 - s.logp.exp()) ** 2 * -s.logp)   # a loss of your own
fastloss.linear_row_loss(hidden, head.weight, None, losses.forward_kl, teacher=fastloss.TeacherHead(h, w), temperature=2.0)
```

Symbols: z a row of scores, p = softmax(z), y the target, d = z_y - LSE of the other columns (the margin), pi the softmax over
the other columns, t and q = softmax(t) the teacher's, T the temperature, phi' the derivative of a loss of d. "statistics" are
what the kernels compute beyond z_y and the LSE of the rest; "gradient" is dL/dz_j unless it says otherwise. Losses in the
second and third table take other inputs than `RowStats`: see their docstrings.
"""

PAIRS = """Functions of embeddings, `fastloss.contrastive.<name>`, most with a module of the same name (`NTXentLoss`); no
similarity matrix is stored. s = 1 / tau is the scale, <q, k> a similarity, P and N positives and negatives of a row,
`reduction` "mean" (over all rows), "mean_valid" (over rows that have a positive), "sum" or "none".
"""


def _defaults(e: Entry) -> str:
    return ", ".join(f"{name}={_plain(value)}" for name, value in e.defaults.items() if value is not None)


def _plain(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value)


def _statistics(e: Entry) -> str:
    if not callable(e.statistics):
        named = list(e.statistics)
    else:
        try:
            named = list(e.statistics(**e.defaults))
        except TypeError:
            named = []
        named.append("by parameters")
    if e.temperature is not None:
        named.append("T")
    try:
        extra = {} if e.engine is None else dict(e.engine(**e.defaults))
    except TypeError:  # needs a tensor
        extra = {"generated": None} if e.name == "hl_gauss" else {"listed": None}
    return ", ".join([*named, *extra])


def _row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _table(chosen: list[Entry]) -> list[str]:
    lines = [
        _row("loss", "formula", "statistics", "gradient", "defaults", "source", "where published code goes wrong"),
        "|---|---|---|---|---|---|---|",
    ]
    for e in chosen:
        lines.append(
            _row(f"`{e.name}`", e.formula, _statistics(e), e.gradient, _defaults(e), e.source, e.published or "-")
        )
    return lines


def page() -> str:
    """The whole of docs/losses.md."""
    everything = entries()
    rows = [e for e in everything if e.rows]
    pairs = [e for e in everything if e.function.__module__.startswith("fastloss.contrastive")]
    others = [e for e in everything if not e.rows and e not in pairs]
    parts = [HEAD, f"## Row losses ({len(rows)})\n", *_table(rows), "", f"## Other losses ({len(others)})\n"]
    parts += [*_table(others), "", f"## Contrastive losses ({len(pairs)})\n", PAIRS, *_table(pairs)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
