"""A page that shows, token by token, what a datastore changes and who speaks for it."""
