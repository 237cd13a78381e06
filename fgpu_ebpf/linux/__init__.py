"""Interfaces of the Linux kernel and the C library: system calls, /proc, cgroups, ELF files, logs and threads."""
