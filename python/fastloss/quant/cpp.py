"""The bit ops of the `cpp` backend: each module registers its kernels."""

from . import cpp_lowbit  # noqa: F401  (it registers its kernel)
