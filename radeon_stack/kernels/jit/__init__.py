"""The Triton side of the kernels: these files import triton alone, so that they compile where there is no torch."""
