"""The inverted-file index."""
