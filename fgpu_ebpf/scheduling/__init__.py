"""Compute time: which tenant uses a device next and for how long, without input or output."""
