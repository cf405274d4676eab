"""One measurement in a process of its own: `python bench/worker.py '{"action": "peak" | "time", "group": {...}, ...}'`.

The answer is the last line of stdout, in JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from common import Group
from implementations import Case, build
from interleave import interleaved, report
from memory import peak_of_device, peak_of_process


def _settle(group: Group, case: Case, impl: str) -> None:
    """Make what stays for good: thread stacks, library state, compiled code.

    By a sixteenth of the rows, so that a workspace kept from call to call still counts in the call that is measured;
    torch.compile alone gets the full shape, since it compiles for each.
    """
    if impl == "torch_compile":
        case.calls[impl]()
    else:
        n, *rest = group.shape
        build(replace(group, shape=(max(1, n // 16), *rest))).calls[impl]()
    for operand in case.operands:  # also what finding out which backends run has left behind
        operand.grad = None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    group = Group.from_dict(request["group"])
    case = build(group)
    if request["action"] == "time":
        return report(interleaved(case.calls, case.ours, request["budget"]), case.ours)
    if request["action"] == "peak":
        impl = request["impl"]
        probe = peak_of_device if group.device == "cuda" else peak_of_process
        return {"peak_bytes": probe(case.calls[impl], lambda: _settle(group, case, impl))}
    raise ValueError(f"unknown action {request['action']!r}: peak or time")


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
