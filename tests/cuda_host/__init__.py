"""The CUDA kernels on the host: built by g++ against csrc/cuda/host, called through ctypes."""
