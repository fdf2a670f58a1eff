"""Searching a datastore on many machines: Ray actors that each search a share of its entries."""
