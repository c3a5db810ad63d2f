"""Checks of the model types of transformers."""
