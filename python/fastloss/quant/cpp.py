"""The bit ops of the `cpp` backend: each module registers its kernels."""

from __future__ import annotations

from . import (  # noqa: F401  (each registers its kernels)
    cpp_bgemm,
    cpp_binarize,
    cpp_fake_quant,
    cpp_groups,
    cpp_hash,
    cpp_lowbit,
    cpp_pack,
)
