"""The pair kernels of the `cpp` backend."""
