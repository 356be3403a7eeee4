"""The `export` workload: merged, converted, loaded by other programs, asked, and compared."""
