"""Measurements of the project against its peers: `python -m benchmarks.run CASE`."""

import os
from pathlib import Path

# Files of data that are not part of the project may lie beside it.
os.environ.setdefault("PACED_FAST_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
