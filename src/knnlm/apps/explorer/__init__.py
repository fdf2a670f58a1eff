"""A page that shows, token by token, what a datastore changes and which passages spoke for it."""
