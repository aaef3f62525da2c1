"""A run: its configuration, its folder, and what its stages start from."""
