"""The pinned BPF maps with limits, charges and shares of compute time, and the meaning of their entries."""
