"""Datastores of other tools, read and written as the arrays that these tools keep."""
