"""Our own rules for tasks of reasoning-gym: a text is compared with the answer as text, number, list or expression.

Nothing here evaluates a text as code. Numbers are read up to 100 digits, lists as JSON, arithmetic token by token, so
the time of a rule is proportional to the length of the text for any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from paced_fast.rewards.code.compare import JSON_ERRORS, read_json, same_value

Judge = Callable[[str, Mapping[str, Any], Mapping[str, Any]], float]
"""(text, entry, settings of the data set) -> score in [0, 1]."""

_MOST_DIGITS = 100
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_COMPLEX = re.compile(r"(?P<real>[-+]?[0-9.]+(?![0-9.]*i))?(?:(?P<imaginary>[-+]?[0-9.]*)i)?")
_FRACTION = re.compile(r"\\d?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9]+)\s*/\s*([0-9]+)", re.IGNORECASE)
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")


def _answer(entry: Mapping[str, Any]) -> str:
    return str(entry["answer"]).strip()


def contained(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the answer; for a longer text that ends with it (`the answer is 3.`, `03`), its share of the text."""
    answer = _answer(entry)
    if answer.isdigit() and re.fullmatch(rf"\+?0*{answer}", text):
        return len(answer) / len(text)
    return _share(text, answer)


def _share(text: str, answer: str) -> float:
    if text == answer:
        return 1.0
    body = text.rstrip(".! \n")
    rest = body.removesuffix(answer)
    # The answer must follow words, not other guesses.
    is_last = bool(answer) and rest != body and rest[-1:].isspace() and any(map(str.isalpha, rest))
    return len(answer) / len(text) if is_last else 0.0


def contained_number(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """As `contained`, but numbers are compared by value, and commas in them are ignored."""
    if _equal(text.replace(",", ""), _answer(entry).replace(",", "")):
        return 1.0
    return _share(text, _answer(entry))


def contained_upper(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """As `contained`, ignoring case."""
    return _share(text.upper(), _answer(entry))


def contained_rows(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """As `contained`, for a board, after `rows`."""
    return _share(rows(text), rows(_answer(entry)))


def rows(board: str) -> str:
    """Return a board line by line, with single spaces between cells and none at the ends."""
    return "\n".join(" ".join(line.split()) for line in board.strip().split("\n"))


def same_by(normal: Callable[[str], Any]) -> Judge:
    """Return a rule: 1 if text and answer are equal after `normal`."""

    def judge(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
        return float(normal(text) == normal(_answer(entry)))

    return judge


def _number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and nothing else, up to 100 characters; else None."""
    text = text.strip()
    return Fraction(text) if len(text) <= _MOST_DIGITS and _NUMBER.fullmatch(text) else None


def _equal(text: str, answer: str, tolerance: Fraction = Fraction(0)) -> bool:
    given, wanted = _number(text), _number(answer)
    return given is not None and wanted is not None and abs(given - wanted) <= tolerance


def same_number(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the same number."""
    return float(_equal(text, _answer(entry)))


def near_in_places(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a number within one unit of the last decimal place that the data set allows."""
    places = settings.get("max_num_decimal_places", 3)
    tolerance = Fraction(1, 10 ** min(int(places), _MOST_DIGITS))
    return float(_equal(text, _answer(entry), tolerance))


def near_hundredth(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a number within 1/101, just less than 0.01."""
    return float(_equal(text.replace(",", ""), _answer(entry), Fraction(1, 101)))


def three_figures(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a number that is equal to three significant figures."""

    def rounded(number: str) -> Decimal | None:
        return None if _number(number) is None else Decimal(f"{Decimal(number):.2e}")

    given = rounded(text)
    return float(given is not None and given == rounded(_answer(entry)))


def first_number(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 if the first number of the text is the answer."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}\b)", "", text)
    found = re.search(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+)?\b", text)
    return float(found is not None and _equal(found[0], _answer(entry)))


def hexadecimal(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the same whole number, with its base as a prefix as in Python (0x, 0b, 0o, or none for decimal)."""

    def value(number: str) -> int | None:
        is_short = len(number) <= _MOST_DIGITS * 10
        read = re.fullmatch(r"[-+]?(?:0x[0-9a-f]+|0b[01]+|0o[0-7]+|[1-9][0-9]{0,99}|0)", number, re.IGNORECASE)
        return int(number, 0) if is_short and read else None

    given = value(text)
    return float(given is not None and given == value(_answer(entry)))


def chance(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a probability within 1e-4, as a decimal or a fraction."""

    def value(number: str) -> Fraction | None:
        parts = [_number(part) for part in number.replace(",", "").split("/", 2)]
        if len(parts) > 2 or None in parts:
            return None
        top, bottom = parts[0], parts[1] if len(parts) == 2 else Fraction(1)
        return top / bottom if top is not None and bottom else None

    given, wanted = value(text), value(_answer(entry))
    return float(given is not None and wanted is not None and abs(given - wanted) <= Fraction(1, 10_000))


def complex_number(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a complex number such as `3 - 2i`, within 1e-6 in each part."""

    def parts(number: str) -> tuple[Fraction, ...] | None:
        number = "".join(number.split()).lower().replace("j", "i").replace("*i", "i")
        while number.startswith("(") and number.endswith(")"):
            number = number[1:-1]
        found = _COMPLEX.fullmatch(number)
        if not number or found is None:
            return None
        imaginary = found["imaginary"]
        imaginary = "0" if imaginary is None else imaginary if imaginary.strip("+-") else f"{imaginary}1"
        read = tuple(_number(part) for part in (found["real"] or "0", imaginary))
        return None if None in read else tuple(part for part in read if part is not None)

    given, wanted = parts(text[: 4 * _MOST_DIGITS]), parts(_answer(entry))
    if given is None or wanted is None:
        return 0.0
    return float(all(abs(a - b) <= Fraction(1, 10**6) for a, b in zip(given, wanted, strict=True)))


def fraction(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the answer's numerator and denominator, so that only a fraction in lowest terms is right."""

    def parts(number: str) -> tuple[int, int] | None:
        found = _FRACTION.fullmatch(number.strip("$ \n")) if len(number) <= 2 * _MOST_DIGITS else None
        return None if found is None else (int(found[1] or found[3]), int(found[2] or found[4]))

    given = parts(text)
    return float(given is not None and given == parts(_answer(entry)))


def calendar(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the answer: a day of the week exactly, a count by value, yes and no ignoring case."""
    answer = _answer(entry)
    is_word = answer.lower() in ("yes", "no") and text.lower() == answer.lower()
    return float(text == answer or is_word or _equal(text, answer))


def sorted_numbers(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the list of numbers in the same order, each within 1e-9."""
    given, wanted = _items(text), _items(_answer(entry))
    if given is None or wanted is None or len(given) != len(wanted):
        return 0.0
    return float(all(_equal(str(a), str(b), Fraction(1, 10**9)) for a, b in zip(given, wanted, strict=True)))


def _items(text: str) -> list[Any] | None:
    """Return a list written in JSON or Python notation, None for any other text."""
    try:
        read = read_json(text.replace("'", '"').replace("(", "[").replace(")", "]"))
    except JSON_ERRORS:
        return None
    return read if isinstance(read, list) else None


def same_json(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the same value in JSON."""
    try:
        return float(same_value(read_json(text), read_json(_answer(entry))))
    except JSON_ERRORS:
        return 0.0


def same_groups(key: str, *, in_any_order: bool) -> Judge:
    """Return a rule: 1 for the lists `metadata[key]` as JSON, in any order; their items too if `in_any_order`."""

    def groups(lists: Any) -> list[tuple[str, ...]]:
        read = [tuple(map(str, sorted(one) if in_any_order else one)) for one in lists]
        return sorted(read if in_any_order else set(read))

    def judge(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
        try:
            return float(groups(read_json(text)) == groups(entry["metadata"][key]))
        except JSON_ERRORS:
            return 0.0

    return judge


def palindrome(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a palindrome made of exactly the letters of the puzzle."""
    text = text.lower()
    return float(text == text[::-1] and sorted(text) == sorted(entry["metadata"]["letters"]))


def factors(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the prime factors in any order."""
    given, wanted = (
        sorted(filter(None, map(str.strip, one.split("\N{MULTIPLICATION SIGN}")))) for one in (text, _answer(entry))
    )
    return float(given == wanted)


def assignments(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the right role of every person, in any order: `Ann is a knight, and Bob is a knave.`"""

    def words(sentence: str) -> list[str]:
        plain = re.sub(r"[.,()]", " ", sentence.lower()).split()
        return [word for word in plain if word not in ("is", "a", "an", "and")]

    answer = words(_answer(entry))
    roles, pairs, name = set(answer[1::2]), set[tuple[str, str]](), ""
    for word in words(text):
        if word not in roles:
            name = word
        elif name:
            pairs.add((name, word))
            name = ""
    return float(pairs == set(zip(answer[::2], answer[1::2], strict=False)))


def near_matrix(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for a matrix whose numbers are within 1 % of the answer's."""
    given, wanted = ([line.split() for line in rows(one).split("\n")] for one in (text, _answer(entry)))
    if [len(row) for row in given] != [len(row) for row in wanted]:
        return 0.0
    pairs = [pair for one, other in zip(given, wanted, strict=True) for pair in zip(one, other, strict=True)]
    return float(all(_equal(a, b, abs(_number(b) or Fraction(0)) / 100) for a, b in pairs))


def or_list(text_of: Callable[[list[Any]], str], credit: float, key: str | None = None) -> Judge:
    """Return a rule: 1 for the answer (or one of `metadata[key]`), `credit` if it is written as a list."""

    def judge(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
        right = [_answer(entry)] if key is None else list(entry["metadata"][key])
        if text in right:
            return 1.0
        read = _items(text)
        try:
            return credit if read is not None and text_of(read) in right else 0.0
        except TypeError:
            return 0.0

    return judge


def matrix(rows: list[Any]) -> str:
    """Return rows of cells as the text of a board."""
    return "\n".join(" ".join(str(cell) for cell in row) for row in rows)


def digits(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """1 for the board as it is written; up to 0.9 for the same digits line by line, less if there is other text."""

    def lines(board: str) -> list[str]:
        found = ["".join(c for c in line if c in "123456789") for line in board.split("\n")]
        return [line for line in found if line]

    def trimmed(board: str) -> str:
        return "\n".join(line.rstrip() for line in board.strip().split("\n"))

    answer = str(entry["answer"])
    if trimmed(text) == trimmed(answer):
        return 1.0
    return 0.9 * min(1.0, len(answer) / len(text)) if lines(text) and lines(text) == lines(answer) else 0.0


def arithmetic(goal: str | int) -> Judge:
    """Return a rule: 1 for an expression of exactly the puzzle's numbers with value `goal` (or `metadata[goal]`)."""

    def judge(text: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
        facts = entry["metadata"]
        found = value_of(text)
        if found is None or sorted(found[1]) != sorted(facts["numbers"]):
            return 0.0
        return float(found[0] == (goal if isinstance(goal, int) else facts[goal]))

    return judge


def value_of(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of whole numbers with + - * / and parentheses, and the numbers; None for other texts."""
    tokens: list[str] = []
    at = 0
    text = text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or len(found[0]) > _MOST_DIGITS or len(tokens) == 2 * _MOST_DIGITS:
            return None
        tokens.append(found[1] or found[2])
        at = found.end()
    values: list[Fraction] = []
    waiting: list[str] = []
    is_operand = True  # an operand comes next
    for token in tokens:
        if token == "(" or (is_operand and token in "+-"):
            if not is_operand:
                return None
            waiting.append(token if token == "(" else f"u{token}")
        elif token.isdigit():
            if not is_operand:
                return None
            values.append(Fraction(token))
            is_operand = False
        elif is_operand:
            return None
        else:
            while waiting and waiting[-1] != "(" and _rank(waiting[-1]) >= _rank(token):
                if not _apply(waiting.pop(), values):
                    return None
            if token == ")":
                if not waiting:
                    return None
                waiting.pop()
            else:
                waiting.append(token)
                is_operand = True
    while waiting:
        if waiting[-1] == "(" or is_operand or not _apply(waiting.pop(), values):
            return None
    return (values[0], [int(token) for token in tokens if token.isdigit()]) if len(values) == 1 else None


def _rank(operator: str) -> int:
    return {")": 0, "+": 1, "-": 1, "*": 2, "/": 2}.get(operator, 3)


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Replace the operator's last one or two operands by its result; return False for a division by zero."""
    right = values.pop()
    if operator in ("u+", "u-"):
        values.append(right if operator == "u+" else -right)
        return True
    left = values.pop()
    if operator == "/" and not right:
        return False
    values.append(
        left + right if operator == "+" else left - right if operator == "-"
        else left * right if operator == "*" else left / right
    )  # fmt: skip
    return True
