"""Processes, threads, publishing, telemetry: what every program needs and that knows nothing of
machine learning."""
