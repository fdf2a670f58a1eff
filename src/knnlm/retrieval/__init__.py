"""Datastores as parts of a mixture: searching them, and mixing what they return."""
