"""How much of a training to spend with quantisation."""

from __future__ import annotations

import math

#: Fitted in the paper; mean absolute error of the fraction 0.091.
_FITTED = 6.7297


def qat_fraction(tokens: float, parameters: float, bits: float) -> float:
    """The share of the tokens on which to train quantised, after full precision, for the least loss, in (0, 1).

        f = exp(log S - a / log S) / S = exp(-a / log S),   S = tokens / (parameters bits / 8),   a = 6.7297

    S is tokens per byte of the quantised weights; f rises with it. The fit is of models of 86 million to 2.2 billion
    parameters at 1 to 6 bits. ValueError unless all are > 0 and S > 1.
    Source: "Compute-Optimal Quantization-Aware Training". Its shape of the learning rate's decay was not found.
    """
    for name, value in (("tokens", tokens), ("parameters", parameters), ("bits", bits)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value}")
    per_byte = tokens / (parameters * bits / 8)
    if per_byte <= 1:
        raise ValueError(f"the fit needs more than one token per byte of weights, got {per_byte:.4g}")
    return math.exp(-_FITTED / math.log(per_byte))
