"""The interfaces that the agent serves: the control socket, metrics, health and the web page."""
