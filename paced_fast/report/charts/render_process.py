"""Draws Vega-Lite specifications: a JSON list of (`svg` or `png`, specification) in, one line of JSON for each out.

A process of its own, because the library can end the one it is in: V8 aborts where address space is limited, and the
font code where a text is no XML. A training run that has ended well shall end well.
"""

from __future__ import annotations

import base64
import json
import sys


def main() -> None:
    """Answers each specification with `svg`, `png` in base 64, or `error`."""
    import vl_convert

    for kind, spec in json.load(sys.stdin):
        try:
            if kind == "svg":
                found = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
            else:
                found = base64.b64encode(vl_convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[])).decode()
            answer = {kind: found}
        except ValueError as error:
            answer = {"error": " ".join(str(error).splitlines()[:2])}  # what follows is where in the library
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
