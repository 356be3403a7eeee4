"""What a kernel's binary for an AMD GPU holds, read on a machine that has none. Needs triton, not torch."""
