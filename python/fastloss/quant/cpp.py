"""The bit ops of the `cpp` backend: each module registers its kernels."""

from . import cpp_bgemm  # noqa: F401
