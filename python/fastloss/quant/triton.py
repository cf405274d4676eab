"""The bit ops of the `triton` backend: each module registers its kernels."""
