"""Measurements of the project against its peers: `python -m benchmarks.run CASE`."""
