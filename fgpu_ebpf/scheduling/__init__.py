"""Scheduling of compute time: which tenant uses a device next, and for how long. This package does no I/O."""
