"""The pinned BPF maps with limits, charges and compute time, and the meaning of their entries."""
