"""The completions server: OpenAI's protocol in front of the engine.

A field of the JSON is in `schema`, its meaning in `requests` or `responses`; a route in `routes`.
"""
