"""Arithmetic coding of discrete data by a tractable probabilistic circuit, a reference coder in PyTorch.

Source: "Lossless Compression with Probabilistic Circuits". It is slow (a Python range coder) and close to the circuit's
likelihood; weights are better off with `fastloss.lossless.compress`, whose exponents have nothing that a circuit could learn.

>>> circuit = fit(train, vtree=image_vtree(8, 8), values=17)  # doctest: +SKIP
>>> code = encode(circuit, images)  # doctest: +SKIP
>>> decode(circuit, code)  # doctest: +SKIP
"""

from __future__ import annotations

from .circuit import Circuit
from .coder import decode, encode
from .learn import fit
from .vtree import Vtree, balanced_vtree, image_vtree

__all__ = ["Circuit", "Vtree", "balanced_vtree", "decode", "encode", "fit", "image_vtree"]
