"""End-to-end tests: they use commands, sockets and container runtimes, and import nothing from the package."""
