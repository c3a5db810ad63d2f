"""A run folder as one page a person can read, and several runs side by side.

    python -m paced_fast.report RUN_DIR                      # writes RUN_DIR/report.html and RUN_DIR/plots/*.png
    python -m paced_fast.report RUN_A RUN_B ... --out FILE   # writes a comparison

Reads what a run wrote so far, so it also works while the run goes on; needs no tensor library and no device.
"""

from __future__ import annotations

from paced_fast.report.compare_page import compare
from paced_fast.report.run_page import make_report, try_report

__all__ = ["compare", "make_report", "try_report"]
