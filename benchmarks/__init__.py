"""Benchmarks. `make bench` compares variants in turns, in one process, on random data."""
