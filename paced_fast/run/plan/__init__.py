"""Plans of a run: memory, time (rooflines), devices."""
