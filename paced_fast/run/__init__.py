"""A run around the method: start, steps, records, checkpoints, plans."""
