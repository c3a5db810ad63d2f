"""Charts: their definitions, and how they are drawn."""
