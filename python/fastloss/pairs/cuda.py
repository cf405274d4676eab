"""The pair kernels of the `cuda` backend."""
