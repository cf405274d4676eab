"""The pair kernels of the `cpp` backend."""

from . import cpp_edges, cpp_maps  # noqa: F401  (they register their kernels)
