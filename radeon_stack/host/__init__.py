"""What this machine is: GPUs, engines, memory, the caller."""
