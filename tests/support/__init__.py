"""The library of the end-to-end tests and benchmarks. It imports nothing from fgpu_ebpf."""
