"""Benchmarks: `python -m bench.NAME` from the repository root, or `./dev bench NAME`."""
