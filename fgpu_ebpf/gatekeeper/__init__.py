"""The gatekeeper process: it registers programs that start, maintains their pages and schedules turns on devices."""
