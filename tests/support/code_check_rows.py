"""Tests of programs that cannot be taken apart, by kind, with programs that are right and wrong: for `code`.

A row is a prompt whose code goes on, a test of it, the right completions and the wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as a data set has it; `entry` is the function that the prompt begins."""

    entry: str
    prompt: str
    body: str
    """Of `check`."""
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    before: str = ""
    """What the test defines outside of `check`."""

    @property
    def test(self) -> str:
        lines = "\n".join(f"    {line}" for line in self.body.strip().splitlines())
        return f"METADATA = {{}}\n\n{self.before}\n\ndef check(candidate):\n{lines}\n"


ROWS = {
    "a loop over computed cases": Row(
        entry="digits",
        prompt="def digits(x: int, base: int) -> str:\n    '''The digits of x.'''\n",
        body="assert candidate(8, 3) == '22'\nfor x in range(2, 8):\n    assert candidate(x, x + 1) == str(x)",
        right=("    out = ''\n    while x:\n        out = str(x % base) + out\n        x //= base\n    return out\n",),
        wrong=("    return '22'\n", "    return str(x)\n", "    return int(str(x)) if x != 8 else '22'\n"),
    ),
    "random inputs": Row(
        entry="largest",
        prompt="def largest(xs: list) -> int:\n",
        body="""
import random
for _ in range(50):
    xs = [random.randint(-100, 100) for _ in range(random.randint(1, 9))]
    assert candidate(xs) == max(xs)
""",
        right=("    return max(xs)\n", "    xs.sort()\n    return xs[-1]\n"),
        wrong=("    return xs[0]\n", "    return max(xs[:-1] or xs)\n", "    xs[:] = [7]\n    return 7\n"),
    ),
    "a tolerance and a helper of the prompt": Row(
        entry="root",
        prompt="import math\n\ndef poly(xs: list, x: float):\n"
        "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
        "def root(xs: list):\n    '''Where poly is 0.'''\n",
        body="""
import random, copy
rng = random.Random(42)
for _ in range(20):
    coeffs = [rng.randint(-9, 9), rng.randint(1, 9)]
    assert math.fabs(poly(coeffs, candidate(copy.deepcopy(coeffs)))) < 1e-4
""",
        right=("    return -xs[0] / xs[1]\n", "    global poly\n    poly = None\n    return -xs[0] / xs[1]\n"),
        wrong=(
            "    return 0.0\n",
            "    return float('nan')\n",
            "    return float('inf')\n",
            "    global poly\n    poly = lambda *a: 0.0\n    return 5.0\n",
        ),
    ),
    "a tolerance that nan slips through": Row(
        entry="half",
        prompt="def half(x: float) -> float:\n",
        body="for x in (1.0, 5.5):\n    if abs(candidate(x) - x / 2) > 1e-6:\n        raise AssertionError(x)",
        right=("    return x / 2\n", "    return x / 2 + 1e-8\n"),
        wrong=("    return float('nan')\n", "    return complex('nan+0j')\n", "    return x\n"),
    ),
    "numbers that are not finite, where the test speaks of them": Row(
        entry="mean",
        prompt="def mean(xs: list) -> float:\n",
        body="import math\nassert math.isnan(candidate([]))\nfor n in (1, 2):\n    assert candidate([n]) == n",
        right=("    return sum(xs) / len(xs) if xs else float('nan')\n",),
        wrong=("    return float('nan')\n", "    return sum(xs)\n"),
    ),
    "the function undoes a helper": Row(
        entry="decode",
        prompt="def encode(s: str):\n    return ''.join(chr(ord(c) + 1) for c in s)\n\n\n"
        "def decode(s: str):\n    '''Undo.'''\n",
        body="""
from random import randint, choice
import string
for _ in range(30):
    str = ''.join(choice(string.ascii_lowercase) for i in range(randint(10, 20)))
    assert candidate(encode(str)) == str
""",
        right=("    return ''.join(chr(ord(c) - 1) for c in s)\n",),
        wrong=(
            "    return s\n",
            "    global encode\n    encode = lambda s: s\n    return s\n",
            "    return encode(s)\n",
        ),
    ),
    "a tuple of results, of their types": Row(
        entry="ends",
        prompt="def ends(xs):\n",
        body="for n in (1, 4):\n    low, high = candidate(list(range(n)))\n    assert (low, high) == (0, n - 1)\n"
        "    assert isinstance(candidate([n]), tuple) and candidate([n]) == (n, n)",
        right=("    return min(xs), max(xs)\n",),
        wrong=("    return [min(xs), max(xs)]\n", "    return max(xs), min(xs)\n", "    return min(xs), max(xs), 0\n"),
    ),
    "sorting in its place": Row(
        entry="order",
        prompt="def order(xs: list) -> None:\n",
        body="for xs in ([3, 1, 2], [], [[2], [1]]):\n    want = sorted(xs)\n    inner = list(xs)\n    candidate(xs)\n"
        "    assert xs == want\n    assert all(any(a is b for b in inner) for a in xs) or xs == [1, 2, 3]",
        right=("    xs.sort()\n", "    xs[:] = sorted(xs)\n    return xs\n"),
        wrong=("    return sorted(xs)\n", "    xs = sorted(xs)\n", "    xs.clear()\n", "    xs[:] = [[1], [2]]\n"),
    ),
    "sorting in its place and giving it back": Row(
        entry="order",
        prompt="def order(xs: list) -> list:\n",
        body="for n in range(4):\n    xs = list(range(n, 0, -1))\n    got = candidate(xs)\n    assert got is xs\n"
        "    assert xs == list(range(1, n + 1))",
        right=("    xs.sort()\n    return xs\n",),
        wrong=("    return sorted(xs)\n", "    xs.sort()\n    return list(xs)\n", "    return xs\n"),
    ),
    "leaving an argument as it was": Row(
        entry="order",
        prompt="def order(xs: list) -> list:\n",
        body="for n in range(2, 5):\n    xs = list(range(n, 0, -1))\n    got = candidate(xs)\n"
        "    assert got == sorted(xs)\n    assert xs == list(range(n, 0, -1))",
        right=("    return sorted(xs)\n",),
        wrong=("    xs.sort()\n    return xs\n", "    xs.clear()\n    return []\n"),
    ),
    "an expectation computed after the call": Row(
        entry="order",
        prompt="def keep(xs):\n    return [x for x in xs if x > 0]\n\n\n"
        "def order(xs: list) -> list:\n    '''Those above 0.'''\n",
        body="for n in range(4):\n    xs = list(range(-n, n))\n    assert candidate(xs) == keep(xs)\n"
        "    got = candidate(xs)\n    want = keep(xs)\n    assert got == want",
        right=("    return keep(xs)\n", "    xs[:] = keep(xs)\n    return xs\n"),
        wrong=("    xs.clear()\n    return []\n", "    xs[:] = [1]\n    return [1]\n", "    return xs\n"),
    ),
    "a dictionary and a set that are changed": Row(
        entry="move",
        prompt="def move(source: dict, seen: set) -> int:\n",
        body="for n in range(3):\n    d, s = {i: str(i) for i in range(n)}, {9}\n    assert candidate(d, s) == n\n"
        "    assert d == {}\n    assert s == {9, *range(n)}",
        right=("    n = len(source)\n    seen.update(source)\n    source.clear()\n    return n\n",),
        wrong=("    return len(source)\n", "    source.clear()\n    return 0\n"),
    ),
    "an expected error": Row(
        entry="inverse",
        prompt="class Odd(ValueError):\n    pass\n\n\ndef inverse(x):\n    '''Odd numbers are refused.'''\n",
        body="""
for x in range(2, 9, 2):
    assert candidate(x) == 1 / x
for bad, kind in ((0, ZeroDivisionError), ('a', TypeError), (3, Odd)):
    try:
        candidate(bad)
    except kind as error:
        assert kind is not Odd or error.args == ('odd', 3)
    else:
        assert False, 'no error'
""",
        right=(
            "    if x == 0:\n        raise ZeroDivisionError\n"
            "    if x % 2:\n        raise Odd('odd', x)\n    return 1 / x\n",
            "    class Mine(ZeroDivisionError):\n        pass\n    if x == 0:\n        raise Mine('zero')\n"
            "    if x % 2:\n        raise Odd('odd', x)\n    return 1 / x\n",
        ),
        wrong=(
            "    return 1 / x\n",
            "    raise AssertionError\n",
            "    if x in (0, 3):\n        raise SystemExit\n    return 1 / x\n",
            "    if x in (0, 3):\n        raise KeyboardInterrupt\n    return 1 / x\n",
            "    if x == 3:\n        raise ValueError('odd', 3)\n    return 1 / x\n",
        ),
    ),
    "a generator": Row(
        entry="count",
        prompt="def count(n):\n    '''Squares from n on, without end.'''\n",
        body="import itertools\nfor n in range(3):\n    got = candidate(n)\n    assert next(got) == n * n\n"
        "    assert list(itertools.islice(got, 3)) == [(n + i) ** 2 for i in (1, 2, 3)]",
        right=(
            "    while True:\n        yield n * n\n        n += 1\n",
            "    return (i * i for i in itertools.count(n))\n",
        ),
        wrong=("    while True:\n        yield n\n        n += 1\n", "    yield n * n\n", "    return [n * n] * 4\n"),
    ),
    "other numbers": Row(
        entry="same",
        prompt="from fractions import Fraction\nfrom decimal import Decimal\n\ndef same(x):\n",
        body="numbers = 1 + 2j, 10 ** 300, -3.5e-300, Fraction(1, 3), Decimal('1.10'), 0.1\n"
        "for x in (*numbers, None, True, b'\\x00\\xff', range(3)):\n"
        "    got = candidate(x)\n    assert got == x and type(got) is type(x)\nassert candidate(x=-0.0) == 0",
        right=("    return x\n",),
        wrong=("    return str(x)\n", "    return 1\n", "    return [x]\n"),
    ),
    "odd characters": Row(
        entry="back",
        prompt="def back(s):\n",
        body="for s in ('', '\\x00\\n\\r\\u2028\\x85', '\\ud800', 'a\\U0001f600', '\"\\\\'):\n"
        "    assert candidate(s) == s[::-1]",
        right=("    return s[::-1]\n",),
        wrong=("    return s\n", "    return s[::-1].strip()\n"),
    ),
    "sets, frozen ones and nested keys": Row(
        entry="parts",
        prompt="def parts(xs):\n",
        body="for n in range(3):\n    got = candidate(list(range(n)))\n"
        "    assert got == {frozenset(range(n)): {(1, (2,)): set(range(n))}}",
        right=("    return {frozenset(xs): {(1, (2,)): set(xs)}}\n",),
        wrong=("    return {frozenset(xs): {(1, (2,)): xs}}\n", "    return {tuple(xs): {(1, (2,)): set(xs)}}\n"),
    ),
    "subclasses that honest programs return": Row(
        entry="tally",
        prompt="def tally(xs):\n",
        body="for n in (1, 2):\n    assert candidate(['a'] * n) == ({'a': n}, ['a'])",
        right=(
            "    return Counter(xs), list(set(xs))\n",
            "    d = defaultdict(int)\n    for x in xs:\n        d[x] += 1\n"
            "    return namedtuple('N', 'a b')(d, sorted(d))\n",
        ),
        wrong=("    return Counter(xs), xs + xs\n",),
    ),
    "a value that contains itself": Row(
        entry="knot",
        prompt="def knot():\n",
        body="for _ in range(2):\n    got = candidate()\n    assert got[0] is got and len(got) == 1",
        right=("    xs = []\n    xs.append(xs)\n    return xs\n",),
        wrong=("    return [[]]\n", "    return []\n"),
    ),
    "views of a dictionary": Row(
        entry="keys",
        prompt="def keys(d):\n",
        body="for n in range(3):\n    assert sorted(candidate({i: 0 for i in range(n)})) == list(range(n))",
        right=("    return d.keys()\n", "    return iter(d)\n", "    return map(int, d)\n"),
        wrong=("    return d.items()\n", "    return d.values()\n"),
    ),
    "a helper of the test and the function by its own name": Row(
        entry="triple",
        prompt="def triple(x):\n",
        before="def close(a, b):\n    assert abs(a - b) < 1e-6\n",
        body="for x in range(4):\n    close(candidate(x), 3 * x)\n    close(triple(x), 3 * x)",
        right=("    return 3 * x\n", "    return 3 * x + 1e-9\n"),
        wrong=("    return 3 * x + 1e-5\n", "    return None\n"),
    ),
    "in, unequal and all": Row(
        entry="pick",
        prompt="def pick(xs):\n",
        body="assert candidate([1, 2]) in (1, 2)\nassert candidate([5]) != 4\n"
        "assert all(candidate([i]) == i for i in range(4))\n"
        "assert candidate([candidate([1]), 1]) == 1",
        right=("    return xs[-1]\n",),
        wrong=("    return 1\n", "    return None\n", "    return 5\n"),
    ),
}
