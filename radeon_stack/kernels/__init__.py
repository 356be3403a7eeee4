"""Triton kernels for fine-tuning, each beside a plain-torch reference; usable alone, without the rest.

One source for gfx1201, gfx1200, gfx1100, gfx1151, gfx942, gfx950 and CUDA. On CUDA they were run and measured; for AMD
they were compiled and their binaries read (`docs/kernels.md`), and never run.
"""
