"""Scripts that measure, and what they measured; each runs by itself."""
