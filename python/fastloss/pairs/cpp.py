"""The pair kernels of the `cpp` backend."""

from . import cpp_edges  # noqa: F401  (registers its kernels)
