"""fgpu shares NVIDIA GPUs between containers, with hard memory limits enforced by the kernel."""

__version__ = "0.1.0"
