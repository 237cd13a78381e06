"""Policy files: how they are read and checked, and which limits a workload gets."""
