"""The agent process: the main loop, the settings, the reconciliation with NVML, and the reports."""
