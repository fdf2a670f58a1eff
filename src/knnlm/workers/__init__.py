"""Many processes, on one machine or several, that read the keys of a datastore being built."""
