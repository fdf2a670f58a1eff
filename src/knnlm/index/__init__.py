"""Search for the nearest entries: one protocol, one file for each backend."""
