"""Tenants: the limits that a cgroup gets, and the steps that put the limits in force."""
