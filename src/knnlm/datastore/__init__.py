"""A datastore on disk: its shards, its catalog, and every change to them."""
