"""Container engines and runtimes: how their containers get a limit."""
