"""Render Vega-Lite: read a JSON list of (`svg` or `png`, specification), write one line of JSON for each.

This runs in its own process, because the library can abort the process: V8 does if address space is limited, and the
font code if a text is not valid XML. A chart must not fail a finished training run.
"""

from __future__ import annotations

import base64
import json
import sys


def main() -> None:
    """Answer each specification with `svg`, `png` in base 64, or `error`."""
    import vl_convert

    for kind, spec in json.load(sys.stdin):
        try:
            if kind == "svg":
                found = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
            else:
                found = base64.b64encode(vl_convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[])).decode()
            answer = {kind: found}
        except ValueError as error:
            answer = {"error": " ".join(str(error).splitlines()[:2])}  # the rest is the library's stack trace
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
