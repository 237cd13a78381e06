"""End to end: commands, sockets and container runtimes, and nothing from the package."""
