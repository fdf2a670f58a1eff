"""Text as the language model reads it: documents, and windows of tokens."""
