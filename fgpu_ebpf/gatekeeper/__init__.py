"""The gatekeeper process, which registers starting programs, maintains their pages and schedules turns on devices."""
