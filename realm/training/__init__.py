"""What all training stages share: settings, engine, loop, random streams."""
