"""`python -m paced_fast COMMAND`, which the console script `paced-fast` runs too."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

import paced_fast
from paced_fast.config.presets import BASES
from paced_fast.run.start import signals

COMMANDS = {
    "train": "paced_fast.train",
    "evaluate": "paced_fast.evaluate",
    "export": "paced_fast.export",
    "report": "paced_fast.report.__main__",
    "list": "paced_fast.run.catalogue",
    "doctor": "paced_fast.run.doctor",
}
"""Modules of the commands; each has `main`, and a docstring whose first line says what the command does."""


_ELSEWHERE = {"compare": "`report RUN RUN` compares runs; "}
"""What other programs have as a command of its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command by its name. A preset or an option in its place belongs to `train`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else "--help"
    if first in ("--help", "-h"):
        sys.stdout.write(_help())
    elif first in ("--version", "-V"):
        sys.stdout.write(f"paced-fast {paced_fast.__version__}\n")
    elif first in COMMANDS:
        import_module(COMMANDS[first]).main(words[1:])
    elif first in BASES or first.startswith("-"):
        import_module(COMMANDS["train"]).main(words)
    else:
        near = difflib.get_close_matches(first, (*COMMANDS, *BASES), n=1)
        hint = f"did you mean {near[0]}? " if near else _ELSEWHERE.get(first, "")
        names = f"the commands are {', '.join(COMMANDS)}, and the presets of train {', '.join(BASES)}"
        sys.stderr.write(f"error: unknown command {first[:80]!r}: {hint}{names}\n")
        raise SystemExit(2)


def script() -> None:
    """Console script: `main`, ended in one line by Ctrl-C during slow imports too."""
    signals.end_at_interrupt()
    main()


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: paced-fast COMMAND [...]   (or python -m paced_fast COMMAND [...])",
        "",
        str(paced_fast.__doc__).splitlines()[0],
        "",
        *(f"  {name:<{width}}{_purpose(module)}" for name, module in COMMANDS.items()),
        "",
        "paced-fast COMMAND --help says more; paced-fast --version prints the version.",
    ]
    return "\n".join(lines) + "\n"


def _purpose(module: str) -> str:
    return str(import_module(module).__doc__).splitlines()[0]


if __name__ == "__main__":
    script()
