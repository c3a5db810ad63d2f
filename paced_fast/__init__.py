"""PACED-RL (arXiv 2602.12642): trajectory balance whose learned log Z schedules the prompts and the replay."""

__version__ = "0.1.0"
