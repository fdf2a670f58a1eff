"""Who is near: one protocol, one file for each way to search."""
