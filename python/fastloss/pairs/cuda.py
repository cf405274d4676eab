"""The pair kernels of the `cuda` backend."""

from . import cuda_edges  # noqa: F401  (registers its kernels)
