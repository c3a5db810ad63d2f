r"""Normalise mathematical notation: Unicode, formatting, and the names of functions and constants."""

from __future__ import annotations

import re

from paced_fast.rewards.text import INVISIBLE

_UNICODE = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DIVISION SIGN}": "/",
    "\N{FRACTION SLASH}": "/",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{DEGREE SIGN}": r"^\circ",
    "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{UNION}": r"\cup ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{NO-BREAK SPACE}": " ",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{FIGURE DASH}": "-",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{BULLET OPERATOR}": r"\cdot ",
    "\N{DIVISION SLASH}": "/",
    "\N{SCRIPT SMALL E}": "e",
    "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "\N{GREEK SMALL LETTER BETA}": r"\beta ",
    "\N{CUBE ROOT}": r"\sqrt[3] ",
    "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
    "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
    "\N{VULGAR FRACTION ONE THIRD}": r"\frac{1}{3}",
    "\N{VULGAR FRACTION TWO THIRDS}": r"\frac{2}{3}",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{THIN SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{EURO SIGN}": r"\$",
    "\N{POUND SIGN}": r"\$",
}
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789+-")
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*([0-9]+(?:\.[0-9]+)?)")

_FUNCTIONS = {
    name: rf"\{name}"
    for name in (
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh"),
        *("ln", "log", "exp"),
    )
} | {
    "tg": r"\tan",
    "ctg": r"\cot",
    "cotg": r"\cot",
    "cosec": r"\csc",
    "arctg": r"\arctan",
    "arcctg": r"\arccot",
    "atan": r"\arctan",
    "asin": r"\arcsin",
    "acos": r"\arccos",
    "lg": r"\log_{10}",
}
_WRAPPED = r"\\(?:math(?:rm|op|sf|bf|it)|text(?:rm|normal|it|bf)?|mbox|operatorname\*?)\s*\{\s*(?:\\rm\s+)?"
_ANY_FUNCTION = "|".join(sorted(_FUNCTIONS, key=len, reverse=True))
# Bare words exclude names with another meaning in a sentence, such as sec, and names that `_REWRITES` handles.
_NAMES = (
    (re.compile(rf"{_WRAPPED}({_ANY_FUNCTION})\s*\}}"), lambda match: f"{_FUNCTIONS[match[1]]} "),
    (re.compile(rf"\\({_ANY_FUNCTION})(?![A-Za-z])"), lambda match: _FUNCTIONS[match[1]]),
    (
        re.compile(r"(?<![\\A-Za-z])(arc(?:sin|cos|tan|cot|tg|ctg)|(?:sin|cos|tan)h|exp|tg|ctg|lg)(?=\s*[({\\0-9])"),
        lambda match: _FUNCTIONS[match[1]],
    ),
    (re.compile(rf"(?:{_WRAPPED}|\{{\s*\\rm\s+)([ei])\s*\}}"), r" \1 "),
    (re.compile(rf"{_WRAPPED}d\s*\}}(?=\s*[a-z])"), "d"),
    (re.compile(r"(?<=[0-9]) ?[xX] ?(?=10\s*\^)"), r"\\times "),
)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(
    rf"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])(?:\^\{{?[0-9]\}}?)?(?:\\left)?"
    rf"[({{ ]*-?[0-9.]+\}}?(?:{_DEGREES.pattern})"
)
_DRESS = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?"
    r"|(?<!\\)\\(?:[!,;:> ]|q?quad(?![A-Za-z]))|\\?\$|~"
)
_REWRITES = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mathrm|textbf|mathbf|textrm|textit|mathit|mbox|operatorname|textsf)(?=\s*\{)"), r"\\text"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\{\}(?=\^)"), ""),
    (re.compile(r"\\log_\s*(\w)"), r"\\log_{\1}"),
    (re.compile(r"(?<![A-Za-z\\])\s*i(?![A-Za-z])"), " i "),
    (re.compile(r"\{([,:])\}"), r"\1"),
    (re.compile(r"(?<![\w}\]^\\ ])\{([0-9.]+)\}(?![0-9{])"), r"\1"),  # lone braces: {3}/{8}
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|ln|log|infty)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\begin\{[bvB]matrix\}"), r"\\begin{pmatrix}"),
    (re.compile(r"\\end\{[bvB]matrix\}"), r"\\end{pmatrix}"),
    (re.compile(r"\s*(?:\\text\s*\{\s*percent\s*\}|(?<=\d) percent$)"), r"\\%"),
    (re.compile(r"\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"), ""),
    (re.compile(r",?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*"), ", "),
    (re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])"), ""),
)


def plain(text: str) -> str:
    """Return the text in the normal notation that the rules of `forms` expect."""
    text = spelled(text)
    text = _DRESS.sub("", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).removesuffix(".").strip()


def spelled(text: str) -> str:
    r"""Return the text in LaTeX, with the usual names of functions and constants: \arctan, \log_{10}, e, i."""
    text = " ".join(text.strip(INVISIBLE).split())  # runs of spaces make the patterns slow
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1}", text)
        text = _RAISED.sub(lambda match: "^{" + match[0].translate(_LOWERED) + "}", text)
        for character, replacement in _UNICODE.items():
            text = text.replace(character, replacement)
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    if _DEGREES.search(text):
        text = _TRIGONOMETRIC.sub(lambda match: _DEGREES.sub(r"\\frac{\\pi}{180}", match[0]), text)
    return text


def has_degrees(text: str) -> bool:
    """Return True if a text contains an unevaluated trigonometric function of an angle in degrees."""
    return _TRIGONOMETRIC.search(text) is not None
