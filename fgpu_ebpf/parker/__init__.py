"""The parker process, which checkpoints GPU processes to host memory and restores these processes."""
