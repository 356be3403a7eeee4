"""Benchmarks: a suite is one file; timing, floors and isolation are shared."""
