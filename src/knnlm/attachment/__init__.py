"""The mixture inside an unmodified Hugging Face model."""
