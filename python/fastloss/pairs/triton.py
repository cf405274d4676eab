"""The pair kernels of the `triton` backend."""
