"""Triton kernels beside their plain-torch references. Usable alone, without the rest of radeon-stack."""
