"""The bit ops of the `triton` backend: each module registers its kernels."""

from . import triton_hash, triton_ops  # noqa: F401
