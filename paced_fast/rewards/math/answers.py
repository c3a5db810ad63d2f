"""Extract and normalise the text of an answer (boxes, answer keys), and refuse answers too costly to verify."""

from __future__ import annotations

import re

from paced_fast.rewards.text import INVISIBLE, whole_number

MAX_CHARACTERS = 400
"""Maximum length of an answer in characters; one up to twice as long as the gold is allowed too."""
_MAX_DEPTH = 10
_MAX_BOXES = 20
_BOX = re.compile(r"\\boxed\s*\{")

# An unevaluated sum or product restates the problem, it is not the answer; 3 \times 10^4 is a number.
_ARITHMETIC = re.compile(r"[0-9)}!]\s*(?:[-+*]|\\pm|\\(?:times|cdot)(?!\s*10\^))")
# Likewise for operations that the verifier would have to compute; an answer may contain those that the gold contains.
_COMPUTATION = re.compile(
    r"\\(?:sum|prod|i*int|oint|lim|limsup|liminf|frac\s*\{?\s*d|binom|[dt]binom|choose|bmod|pmod)"
)
# Operations that yield a whole number for any argument: refused if the gold has no variable.
_ROUNDED = re.compile(
    r"\\(?:max|min|gcd|lcm|floor|ceil|lfloor|lceil)(?![A-Za-z])"
    r"|\\(?:operatorname|text|mathrm)\s*\{\s*(?:max|min|gcd|lcm|floor|ceil)\b"
)
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])")
_ABSURD = re.compile(
    "|".join(
        (
            r"[0-9]{60}",
            r"\^\s*[{(\s]*[-+]?[0-9]{5}",  # an exponent of five digits
            r"\^\s*[{(\s]*[-+0-9.]+[})\s]*\^",  # a tower of numbers
            r"\^[^^]*\{[^{}^]*\^[^{}^]*\{[^{}^]*\^",  # a tower of anything, three high
            r"[0-9]{4}\s*!|[!)}\]]\s*!|\^\s*[{(\s]*[0-9]+[})\s]*!",  # factorials of large or compound numbers
            r"[])}]\s*\^\s*\{?\s*(?:[2-9][0-9]|[0-9]{3})",  # a high power of a sum
            r"[])}]\s*\^.*[])}]\s*\^.*[])}]\s*\^",
            r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z]).*\^\s*\{?\s*-?[0-9]{3}",
            r"\*\*.*\*\*|(?:\\(?:exp|sin|cos|tan|log|ln)(?![A-Za-z]).*){9}",
            r"([-+*/|^=<>!])(?:\s*\1){3}|(?:\|.*){9}",
            r"[\x00-\x08\x0e-\x1f]|(?:[^\x00-\x7f].*){9}",
            r"[0-9][eE][-+]?[0-9]{3}",
            r"__|\\(?:input|write|def|let|csname|catcode)\b",
        )
    )
)
# Words after a number that may be omitted, except those that change its value.
_CHANGES = r"(?!\s*(?:pi|hundred|thousand|[mbtr]+illion|dozen|half|squared|cubed|to|or|and)\b)"
_VERBS = (
    r"(?![A-Za-z ]*\b(?:no|not|or|and|but|if|unless|do|does|is|are|was|were|be|will|would|can|cannot|could|may|might"
    r"|leads|implies|fails|gives|yields)\b)"
)
_UNIT = re.compile(
    rf"(?:(?<=[0-9])|(?<=\\pi))(?:\s*\\text\{{{_CHANGES}[A-Za-z ]+\}}|\s+{_CHANGES}{_VERBS}[A-Za-z]{{3,}}[A-Za-z ]*"
    r"|\s+(?:km|mi|m|ft|cm|kg|g)/(?:h|hr|s|min|L|m))$"
)
_HALF_DAY = re.compile(r"(?<=[0-9])\s*(?:\\text\s*\{\s*)?([AaPp])\.?\s*[Mm]\b\.?\s*\}?$")
TIME = re.compile(r"[0-9]{1,2}(?::[0-9]{2})? [ap]m")
"""Time of day, after `tidy`."""
_LETTER = re.compile(r"\(?[A-J]\)?")
_LETTERED = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s))\s*(?!.*(?<![A-Za-z])[A-J]\))(?![,;&/]|(?:or|and)\b)\S.*")
DATE = re.compile(
    r"(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*\.? [0-9]{1,2}(?:st|nd|rd|th)?(?:,? [0-9]{4})?"
)
_LENGTH = re.compile(
    r"(?<=[0-9])\s+(?:(?:sq|cu)\.? )?(?:m|g|L|h|s|ft|in|cm|mm|km|kg|lbs?|oz|mi|yd|hrs?|min)"
    r"(?:\s?\^?\{?[23]\}?|\u00b2|\u00b3)?\.?$"
)
_SUM_OF_NAMES = re.compile(r"(?:[0-9A-Za-z+*^{}()| -]|\\cdot(?![A-Za-z]))+")
# Named quantities: f(3), a_{10}, AB, |z|^2, \angle ABC, [ABC], P(A), \cos\theta.
_QUANTITY = re.compile(
    r"[A-Za-z]\s*\([-0-9]+\)|[A-Za-z]_(?:[0-9]|\{[0-9A-Za-z]+\})|[A-Z]{2,4}(?:\^2)?|\|[zw](?:_[0-9])?\|(?:\^2)?"
    r"|(?:m\s*)?\\(?:angle|measuredangle|triangle)\s*[A-Z]{1,3}|\[[A-Z]{3,6}\]|P\s*\([A-Z]\)|[0-9]+\s*[A-Z]{2}"
    r"|\\(?:overline|underline|overrightarrow)\s*\{\s*\w{2,}\s*\}"
    r"|\\(?:sin|cos|tan)\s*(?:\\(?:theta|alpha|beta|angle\s*[A-Z]{1,3})|\(?[A-Z]\)?)"
)
_OPENING = re.compile(r"(\\[{}]|[][(){}])")


def key_text(text: str) -> str:
    r"""Return the answer in an answer key: its last \boxed{}, else the line after #### or "answer is", else all."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        return braced(text, start + len("\\boxed{")) or ""
    for pattern in (r"####", r"(?i:\banswer(?: is|:))"):
        pieces = re.split(pattern, text)
        if len(pieces) > 1:
            return (pieces[-1].strip().splitlines() or [""])[0]
    return text


def boxes(text: str) -> list[str]:
    r"""Return the content of each \boxed{} after the last </think>; [] if one is not closed or there are over 20."""
    text = text[text.rfind("</think>") + 1 :]
    found: list[str] = []
    for match in _BOX.finditer(text):
        inside = braced(text, match.end())
        if inside is None or len(found) == _MAX_BOXES:
            return []
        found.append(inside)
    return found


def braced(text: str, begin: int) -> str | None:
    """Return the text from `begin`, just after "{", to the matching "}"; None if that is far away or missing."""
    depth = 0
    for end in range(begin, min(len(text), begin + 4 * MAX_CHARACTERS)):
        if text[end] == "}" and depth == 0:
            return text[begin:end]
        depth += {"{": 1, "}": -1}.get(text[end], 0)
    return None


def is_absurd(answer: str, gold: str) -> bool:
    """Return True if an answer is too long, nested, large or unevaluated to be a serious answer for this gold."""
    gold = gold[: 10 * MAX_CHARACTERS]
    if len(answer) > max(MAX_CHARACTERS, 2 * len(gold)) or _depth(answer) > max(_MAX_DEPTH, _depth(gold)):
        return True
    if _ABSURD.search(answer) and not _ABSURD.search(gold):
        return True
    patterns = [_COMPUTATION] if _VARIABLE.search(re.sub(r"\\[A-Za-z]+", " ", gold)) else [_COMPUTATION, _ROUNDED]
    return any(not set(pattern.findall(answer)) <= set(pattern.findall(gold)) for pattern in patterns)


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _OPENING.findall(text):
        depth += 1 if bracket[-1] in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def tidy(text: str) -> str:
    """Return the answer without dollar signs, spacing commands, `x =`, units, percent sign and thousands commas."""
    text = text[: 10 * MAX_CHARACTERS].strip().strip(INVISIBLE)
    text = re.sub(r"\\(?:left|right|displaystyle)\b|\\[!,;: ]|\\?\$", "", text).strip()
    text = text.replace("\N{MINUS SIGN}", "-").removesuffix(".").strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", text)
    text = _HALF_DAY.sub(lambda match: f" {match[1].lower()}m", text)
    text = _UNIT.sub("", text)
    text = re.sub(r"(?<=[0-9}])\s*\\?%$", "", text)
    if re.fullmatch(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(",", "")
    wrapped = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return wrapped[1].strip() if wrapped else text


def value_of_quantity(text: str) -> str:
    """Return the value of `left = value` if the left side is a sum of names or a named quantity; "" for other texts.

    A single unknown does not count: `2x = 6` is not solved yet, and `y = x + 1` is a line.
    """
    left, *right = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text.strip().strip("$")).split("=")
    if len(right) != 1 or len(left) > 60 or not re.search(r"[0-9]|\\[a-z]", right[0]):
        return ""
    left = left.strip()
    names = set(re.findall("[A-Za-z]", left.replace("\\cdot", "")))
    is_sum = len(names) > 1 and _SUM_OF_NAMES.fullmatch(left) and not re.search("[A-Za-z]{3}", left)
    is_known = not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", right[0]))
    return right[0].strip() if is_known and (is_sum or _QUANTITY.fullmatch(left)) else ""


def in_form(answer: str, gold: str) -> str:
    """Return the answer without parts that its gold omits: the name of a quantity, the text of a choice, base ten."""
    bare = tidy(gold)
    if _LETTER.fullmatch(bare) and (lettered := _LETTERED.fullmatch(answer.strip())):
        return lettered[1]
    if whole_number(bare) is not None:
        answer = _LENGTH.sub("", answer)
    if "_" not in bare:
        answer = re.sub(r"(?<=[0-9])_(?:10|\{\s*10\s*\})(?=\$?$)", "", answer)
    if "=" in gold or "=" not in answer:
        return answer
    named = re.fullmatch(r"\(([a-z],\s*)+[a-z]\)\s*=\s*(\(.*\))", answer.strip())
    return named[2] if named else value_of_quantity(answer) or answer


def has_words(text: str) -> bool:
    """Return True if a text has three letters in a row outside LaTeX commands."""
    return re.search(r"[A-Za-z]{3,}", re.sub(r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+", " ", text)) is not None


def is_one_value(answer: str, gold: str) -> bool:
    """Return True if an answer has as many values as the gold, so that no list of guesses reaches math-verify."""
    if not answer or re.search(r"[0-9]\s+[0-9]", answer):
        return False
    if has_words(answer) or re.search(r"\b(?:or|and)\b", answer):
        return False
    if whole_number(gold) is not None and _ARITHMETIC.search(answer):
        return False
    brackets = [re.match(r"\\?[(\[{]", text) for text in (answer, gold)]
    if all(brackets) and len({match[0] for match in brackets if match}) > 1:
        return False
    return all(answer.count(symbol) == gold.count(symbol) for symbol in "=,;")
