"""Report of a run folder as one HTML page, or a comparison of several runs.

    python -m paced_fast report RUN_DIR                      # writes RUN_DIR/report.html and RUN_DIR/plots/*.png
    python -m paced_fast report RUN_A RUN_B ... --out FILE   # writes a comparison

Also works while the run is still going: it reads the files written so far. Needs no tensor library and no device.
"""

from __future__ import annotations

from paced_fast.report.compare_page import compare
from paced_fast.report.run_page import make_report, try_report

__all__ = ["compare", "make_report", "try_report"]
