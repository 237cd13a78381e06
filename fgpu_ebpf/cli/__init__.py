"""The command `fgpu`."""
