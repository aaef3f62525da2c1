"""Processes, threads, atomic publishing and telemetry: utilities without machine learning."""
