"""The workloads of this host: the container, pod or unit of a cgroup, and the labels of a cgroup."""
