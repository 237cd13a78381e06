"""The agent process: its main loop, its settings, the reconciliation with NVML, and its reports."""
