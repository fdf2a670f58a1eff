"""A kNN-LM's memory as tools of the Model Context Protocol."""
