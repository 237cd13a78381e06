"""The NVIDIA driver: its libraries and their probes, the BPF programs, and NVML."""
