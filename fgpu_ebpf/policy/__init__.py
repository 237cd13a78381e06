"""Policy files: the reading and checks of the files, and the limits that a workload gets."""
