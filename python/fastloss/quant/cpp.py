"""The bit ops of the `cpp` backend: each module registers its kernels."""

from __future__ import annotations

from . import cpp_bgemm, cpp_binarize, cpp_fake_quant, cpp_groups, cpp_pack  # noqa: F401  (each registers its kernels)
from . import cpp_binarize, cpp_fake_quant, cpp_groups, cpp_lowbit, cpp_pack  # noqa: F401  (each registers its kernels)
