"""Training code of all stages: config sections, engine, loop, random streams."""
