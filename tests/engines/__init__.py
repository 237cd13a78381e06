"""Container engines and runtimes: how their containers come to a limit."""
