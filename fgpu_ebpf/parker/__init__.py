"""The parker process: checkpoints GPU processes to host memory and restores them."""
