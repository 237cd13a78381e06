"""Debian's Slurm, with jobs that share a simulated GPU."""
