"""The bit ops of the `cuda` backend: each module registers its kernels."""

from __future__ import annotations

from . import cuda_bgemm  # noqa: F401
