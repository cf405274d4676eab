"""Triton kernels, installed as `fastloss.triton_kernels`."""
