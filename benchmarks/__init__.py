"""Benchmarks: `make bench`. They compare, in one process, on random data; absolute times are not stored."""
