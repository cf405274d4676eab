"""The bit ops of the `cuda` backend: each module registers its kernels."""
