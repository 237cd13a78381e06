"""The gatekeeper process: it registers programs that start, keeps their pages and gives turns on devices."""
