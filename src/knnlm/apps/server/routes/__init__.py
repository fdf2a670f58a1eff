"""The routes, one file for each group of them; `app.py` adds them to the app."""
