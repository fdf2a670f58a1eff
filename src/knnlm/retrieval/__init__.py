"""Datastores as parts of a mixture: what is searched, and how the results are mixed."""
