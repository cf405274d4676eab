"""The bit ops of the `cpp` backend: each module registers its kernels."""
