"""Model types of transformers."""
