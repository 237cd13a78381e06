"""Workloads of this host: which container, pod or unit a cgroup belongs to, and which labels it has."""
