r"""Parse an answer under the rules of `math_strict`: one value, written out, as a tree that can be compared exactly.

A tree is `[kind, part, ...]`:

    ["number", "1/2"]                            a numeral: 0.5, \frac12, 1/2, 50\%, 1,000, 3\times 10^4, 2^5, 5!
    ["expression", LaTeX]                        any other single value
    ["relation", left, "<=", right, ...]         > and >= are reversed
    ["(]", part, part]  ["()", ...]  ["set", ...]  ["union", ...]  ["ratio", ...]  ["base", digits, base]
    ["text", words]

The order of parts does not matter in a set or a union. Values listed without braces (`2, 3`, `2 or 3`, `\pm 2`) are a
set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from fractions import Fraction
from typing import Any

from paced_fast.rewards.math.notation import has_degrees, plain

Tree = list[Any]

INTERVALS = frozenset(("()", "(]", "[)", "[]"))
"""Kinds of trees that may be intervals."""
_OPENING = {"(", "[", "{", r"\{", r"\langle"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[<>!]=|.", re.DOTALL)
_INFINITE = re.compile(r"\\infty(?![A-Za-z])")
_LIMITS = re.compile(r"\\(?:sum|prod|i*int|lim)(?![A-Za-z])")
# Typing errors and stray symbols that the parser ignores; each is allowed if the gold has it too.
_SLIPS = tuple(
    re.compile(pattern)
    for pattern in (
        r"^(?![0-9.]+'{1,2}$).*'|\\prime(?![A-Za-z])",
        r"[0-9]\s*\}?\s*_",
        r"(?<![A-Za-z\\])[A-Za-z]\s*[0-9]+(?![0-9]|\s*\^)",  # x1; n2^n is a product
        r"[0-9]\s*!\s*[A-Za-z]",
        r"\\(?:mid|setminus|mathbb|lor|land|neg|lnot)(?![A-Za-z])",
        r"(?<=.)\\emptyset|\\emptyset(?=.)",
        r"^[^|]*\|(?:[^|]*\|[^|]*\|)*[^|]*$",  # an unclosed bar
        r"(?:[-+*/^_,;=<>]|\\(?:times|cdot|pm|div|log|ln|frac|sqrt|sin|cos|tan)(?:_\{\w*\})?)\s*$",
        r",\s*[])}]|[\[({]\s*,",
        r"-\s*-|\+\s*\+|/\s*/",
    )
)
_NOT_A_VALUE = re.compile(
    r"\\(?:boxed|approx|sim|Rightarrow|implies|to|rightarrow|dots|ldots|cdots|quad)(?![A-Za-z])|[0-9]\s+[0-9]|[=?@#`\"]"
)
_OPERATORS = {"=": "=", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", "<=": "<=", ">=": ">=", "!=": "!="} | {
    rf"\{name}": sign
    for names, sign in ((("le", "leq", "leqslant"), "<="), (("ge", "geq", "geqslant"), ">="), (("ne", "neq"), "!="))
    for name in names
}
_TURNED = {">": "<", ">=": "<="}

_NUMERAL = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<mantissa>{_NUMERAL})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?P<tens>[-+]?[0-9]{{1,3}}|\{{\s*[-+]?[0-9]{{1,3}}\s*\}})"
    rf"|(?P<power>[0-9]{{1,6}})\s*\^\s*(?P<exponent>[0-9]|\{{\s*[-+]?[0-9]{{1,4}}\s*\}})"
    rf"|(?P<fixed>[0-9]*\.[0-9]*)\s*\\(?:overline|bar)\s*\{{\s*(?P<repeating>[0-9]{{1,40}})\s*\}}"
    rf"|(?P<factorial>[0-9]{{1,3}})!"
    rf"|(?P<whole>[0-9]+)?\s*\\frac\s*\{{\s*(?P<top>[-+]?{_NUMERAL})\s*\}}\s*\{{\s*(?P<bottom>[-+]?{_NUMERAL})\s*\}}"
    rf"|(?:(?P<whole_plain>[0-9]+)\s+)?(?P<top_plain>{_NUMERAL})\s*/\s*(?P<bottom_plain>{_NUMERAL})"
    rf"|(?P<numeral>{_NUMERAL})(?:[eE](?P<tens_plain>[-+]?[0-9]{{1,2}}))?"
    rf")\s*(?P<percent>\\?%)?"
)
_MAX_POWER_DIGITS = 4000
_MAX_CHARACTERS = 4000
_BASE = re.compile(r"([0-9A-F]+)_\{?\s*(?:\\text\{)?\s*([0-9]{1,2}|two|three|four|five|six|seven|eight|nine)\s*\}*")
_DIGITS = {
    name: value for value, name in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"), start=2)
}
_CALCULATION = re.compile(
    r"(?<![\w^_}\\.])[0-9]+(?:\.[0-9]+)?\s*(?:[-+*]|\\times|\\cdot)\s*[0-9]+(?:\.[0-9]+)?(?![\w.(^{\\!]|\s*[A-Za-z\\(])"
)
_NAME = re.compile(r"[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?")
_CHOICE = re.compile(r"\\text\s*\{\s*\(([A-J])\)\s*\}[^A-Z,;]+")
_UNIT = re.compile(
    r"(?:(?<=[0-9)}!])|(?<=\\pi)|(?<=\\pi ))\s*(?:\\text\s*\{\s*(?P<wrapped>[A-Za-z][A-Za-z. /]*?)\s*\}"
    r"|(?P<bare>\s[A-Za-z]{3,}(?: [A-Za-z]+){0,2}|(?:cm|km|mm|ft|in|kg|lb|hr|mi|oz)(?![A-Za-z])))"
    r"(?P<power>\s*\^\s*\{?[23]\}?)?\s*$"
)
# Words that are not units, because they change the number before them.
_MULTIPLIERS = frozenset(
    (
        *("hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "quarter", "third", "twice"),
        *("pi", "e", "i", "k", "squared", "cubed", "square", "root", "base", "mod", "plus", "minus", "times", "over"),
        *("to", "by", "not", "no", "factorial", "percent", "ten", "one", "two", "three", "four", "five", "six"),
        *("seven", "eight", "nine"),
    )
)
_UNIT_NAMES = {
    "cm": "centimeter",
    "centimetre": "centimeter",
    "m": "meter",
    "metre": "meter",
    "km": "kilometer",
    "mm": "millimeter",
    "ft": "foot",
    "feet": "foot",
    "in": "inch",
    "inche": "inch",
    "yd": "yard",
    "h": "hour",
    "hr": "hour",
    "min": "minute",
    "sec": "second",
    "kg": "kilogram",
    "g": "gram",
    "lb": "pound",
    "deg": "degree",
}
KNOWN_UNITS = frozenset(_UNIT_NAMES.values())
"""Normal names of units; two answers whose known units differ are different."""


def tree_of(text: str) -> tuple[Tree, str] | None:
    """Return the tree of an answer and its unit ("" if it has none); None if it is not one value in one form."""
    if len(text) > _MAX_CHARACTERS:
        return None
    text = plain(text)
    unit = ""
    match = _UNIT.search(text)
    if match is not None:
        words = (match["wrapped"] or match["bare"]).casefold().replace(".", "").split()
        if not _MULTIPLIERS & set(words) or words[0] == "square":
            last = words[-1].removesuffix("s")
            squared = {"square": "2", "sq": "2", "cubic": "3"}.get(words[0], "")
            unit = _UNIT_NAMES.get(last, last) + (squared or "".join(re.findall("[23]", match["power"] or "")))
            text = text[: match.start()].strip()
    tree = _tree(text, 0)
    return None if tree is None else (tree, unit)


def has_slips(text: str, gold: str) -> bool:
    """Return True if an answer has primes, subscripts, stray operators or the like that its gold does not have."""
    text, gold = (re.sub(r"\\text\s*\{[^{}]*\}", "()", plain(one[:_MAX_CHARACTERS])) for one in (text, gold))
    return any(slip.search(text) and not slip.search(gold) for slip in _SLIPS)


def is_calculation(text: str) -> bool:
    """Return True if a text contains an unevaluated sum or product of numbers, or a sine or the like in degrees."""
    return _CALCULATION.search(text) is not None or has_degrees(text)


def value_of_assignment(tree: Tree) -> Tree | None:
    """Return the right side of `x = value`, None for any other tree."""
    if tree[0] == "relation" and tree[2:3] == ["="] and len(tree) == 4:
        left = tree[1]
        names = left[1:] if left[0] == "()" else [left]
        if all(name[0] == "expression" and _NAME.fullmatch(name[1]) for name in names):
            return tree[3]
    return None


def listed(tree: Tree) -> Tree:
    r"""Return the set of values of `x = 1, x = -2` or `x = \pm 3`; any other tree unchanged."""
    if tree[0] == "relation":
        value = value_of_assignment(tree)
        return value if value and value[0] == "set" and len(value) == 3 else tree
    if tree[0] != "set" or len(tree) < 3 or any(part[0] != "relation" for part in tree[1:]):
        return tree
    values = [value_of_assignment(part) for part in tree[1:]]
    names = {part[1][1][:1] if part[1][0] == "expression" else "" for part in tree[1:]}
    return tree if None in values or len(names) > 1 else ["set", *values]


def as_interval(tree: Tree) -> Tree:
    r"""Return the interval of `x \le 3` or `2 < x < 5`, the union of `x < 1 or x > 3`; any other tree unchanged."""
    if tree[0] == "set" and len(tree) > 2:
        parts = [as_interval(part) for part in tree[1:] if part[0] == "relation"]
        return ["union", *parts] if [part[0] in INTERVALS for part in parts] == [True] * (len(tree) - 1) else tree
    if tree[0] != "relation" or len(tree) not in (4, 6) or not set(tree[2::2]) <= {"<", "<="}:
        return tree
    names = [side[0] == "expression" and re.fullmatch("[A-Za-df-hj-z]", side[1]) is not None for side in tree[1::2]]
    sides, signs = tree[1::2], tree[2::2]
    if names == [False, True, False]:
        return ["[("[signs[0] == "<"] + "])"[signs[1] == "<"], sides[0], sides[2]]
    if names == [True, False]:
        return ["(" + "])"[signs[0] == "<"], ["expression", r"-\infty"], sides[1]]
    if names == [False, True]:
        return ["[("[signs[0] == "<"] + ")", sides[0], ["expression", r"\infty"]]
    return tree


def _tree(text: str, depth: int) -> Tree | None:
    text = text.strip()
    if depth > 4:
        return None
    if match := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text):
        return _tree(match[1], depth + 1) if "," in match[1] or number_of(match[1]) else _leaf(text)
    if (number := number_of(text)) is not None:
        return ["number", number]
    if match := _BASE.fullmatch(text):
        return ["base", match[1], str(_DIGITS.get(match[2], match[2]))]
    pieces, found = _split(text, {r"\cup"})
    if found:
        return _parts("union", pieces, depth)
    if (wrapped := _unwrap(text)) is not None:
        opening, inside, closing = wrapped
        if (opening, closing) == (r"\{", r"\}"):
            return _parts("set", _split(inside, {",", ";"})[0] if inside.strip() else [], depth)
        pieces, found = _split(inside, {",", ";"})
        if found or opening != "(":
            return _parts(opening + closing, pieces, depth)
        return _tree(inside, depth + 1)
    pieces, found = _split(text, {",", ";"})
    if found:
        return _parts("set", pieces, depth)
    pieces, found = _split(text, _OPERATORS)
    if found:
        return _relation(pieces, [_OPERATORS[operator] for operator in found], depth)
    pieces, found = _split(text, {":"})
    if found:
        return _parts("ratio", pieces, depth)
    if text.count(r"\pm") == 1:
        return _parts("set", [text.replace(r"\pm", sign).strip().removeprefix("+") for sign in "+-"], depth)
    return _leaf(text)


def _leaf(text: str) -> Tree | None:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    if re.fullmatch(r"\(?[A-Za-z]\)?", plain):  # the letter of a choice, or a variable
        return ["expression", plain.strip("()")]
    if match := _CHOICE.fullmatch(text):  # \textbf{(D)}\ 12
        return ["expression", match[1]]
    if re.search(r"(?<!\\)\b[^\W\d_]{2,}", plain) and re.fullmatch(r"[\w .,'()/-]+", plain) and _is_prose(plain):
        words = re.sub(r"[.,'()-]", " ", plain.casefold()).split()
        return ["text", " ".join(words[1:] if words[0] in ("a", "an", "the") else words)]
    if not text.isascii() or not text or _NOT_A_VALUE.search(text) or _is_prose(text):
        return None
    if _INFINITE.search(text) and not _LIMITS.search(text) and not re.fullmatch(r"[-+]?\s*\\infty", text):
        return None  # the parser reads 7-\infty and y\infty as \infty
    if text == r"\emptyset":
        return ["set"]
    if "&" in text and r"\begin" not in text:
        return None
    return ["expression", text.removeprefix("+").strip()]


def _is_prose(text: str) -> bool:
    """Return True if a text has three letters in a row outside LaTeX commands and names of environments."""
    bare = re.sub(r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+", " ", text)
    return re.search(r"[^\W\d_]{3,}", bare) is not None


def _parts(kind: str, pieces: list[str], depth: int) -> Tree | None:
    parts = [_tree(piece, depth + 1) for piece in pieces]
    return None if None in parts else [kind, *parts]


def _relation(pieces: list[str], operators: list[str], depth: int) -> Tree | None:
    if operators[0] in _TURNED:
        pieces, operators = pieces[::-1], [_TURNED.get(operator, operator) for operator in reversed(operators)]
    parts = _parts("relation", pieces, depth)
    if parts is None or any(operator in _TURNED for operator in operators):
        return None
    tree: Tree = ["relation", parts[1]]
    for operator, side in zip(operators, parts[2:], strict=True):
        tree += [operator, side]
    return tree


def _split(text: str, separators: Collection[str]) -> tuple[list[str], list[str]]:
    """Split a text at the separators outside all brackets; return the pieces and those separators."""
    pieces, found, depth = [""], [], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in separators:
            found.append(token)
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces], found


def _unwrap(text: str) -> tuple[str, str, str] | None:
    """Return opening bracket, content and closing bracket if one pair encloses the whole text, else None."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in _OPENING - {"{"} or tokens[-1] not in _CLOSING - {"}"}:
        return None
    depth = 0
    for token in tokens[:-1]:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return None
    return (tokens[0], "".join(tokens[1:-1]), tokens[-1]) if depth == 1 else None


def number_of(text: str) -> str | None:
    r"""Return the exact value of a numeral as `p` or `p/q`, None for any other text.

    A fraction or percentage with a whole value keeps its form: neither `10/2` nor `500\%` equals `5`.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or len(text) > 200:
        return None
    part = {
        name: (found or "").replace(",", "").replace(" ", "").strip("{}") for name, found in match.groupdict().items()
    }
    top, bottom = part["top"] or part["top_plain"], part["bottom"] or part["bottom_plain"]
    if part["mantissa"]:
        value = Fraction(part["mantissa"]) * Fraction(10) ** int(part["tens"])
    elif part["power"]:
        if len(part["power"]) * abs(int(part["exponent"])) > _MAX_POWER_DIGITS or int(part["power"]) == 0:
            return None
        if int(part["exponent"]) in (0, 1):  # 5^1 is not a way to write 5
            return None
        value = Fraction(int(part["power"])) ** int(part["exponent"])
    elif part["repeating"]:
        whole, _, digits = part["fixed"].partition(".")
        value = Fraction(int(part["repeating"]), 10 ** len(digits) * (10 ** len(part["repeating"]) - 1))
        value += Fraction(int(f"0{whole}{digits}"), 10 ** len(digits))
    elif part["factorial"]:
        value = Fraction(math.factorial(int(part["factorial"])))
    elif top:
        if Fraction(bottom) == 0:
            return None
        value = Fraction(top) / Fraction(bottom)
        if value.denominator == 1 and value != 0:
            return f"{part['sign']}{top}/{bottom}"
        if whole := part["whole"] or part["whole_plain"]:
            if not 0 < value < 1:
                return None
            value += int(whole)
    else:
        value = Fraction(part["numeral"]) * Fraction(10) ** int(part["tens_plain"] or 0)
    value = -value if part["sign"] == "-" else value
    if not part["percent"]:
        return str(value)
    return str(value / 100) if (value / 100).denominator > 1 else f"{value}%"
