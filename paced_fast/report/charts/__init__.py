"""Charts: which there are, and how they are drawn."""
