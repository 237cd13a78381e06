"""Benchmarks. To run one, type `./dev bench NAME`, or `python -m bench.NAME` in the root of the repository."""
