"""radeon-stack: fine-tuning on AMD Radeon, as commands."""

__version__ = "0.1.0"
