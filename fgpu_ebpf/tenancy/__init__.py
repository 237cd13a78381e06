"""Tenants: which limits each cgroup gets, and how the limits are put in force."""
