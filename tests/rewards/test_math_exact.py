"""Exact numbers are compared exactly, others by as many digits as could tell them apart; and names are read alike."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy

from paced_fast.rewards.math import judge
from paced_fast.rewards.math.constants import fraction, same
from paced_fast.rewards.math.notation import plain
from paced_fast.rewards.math.reward import _decide, _decide_strictly
from paced_fast.rewards.math.roundings import is_rounding

# Gold, answer, and whether it is right for math_strict and for math.
PAIRS = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False, False),
    (r"\frac{1}{2004!}", r"0", False, False),
    (r"2004!", r"2004!+1", False, False),
    (r"2004!", r"2004 \cdot 2003!", True, True),
    (r"\frac{1}{2004!}", r"\frac{2005}{2005!}", True, True),
    (r"2^{-100}", r"2^{-99}", False, False),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False, False),
    (r"e^{-50}", r"e^{-60}", False, False),
    (r"e^{-50}", r"\frac{1}{e^{50}}", True, True),
    (r"\frac{1}{10^{20}}", r"\frac{2}{10^{20}}", False, False),
    (r"\frac{1}{10^{20}}", r"10^{-20}", True, True),
    (r"\mathrm{e}^2", r"e^2", True, True),
    (r"\operatorname{arctan} 2", r"\arctan 2", True, True),
    (r"\lg 2", r"\log_{10}2", True, True),
    (r"\lg 2", r"\log_{10} 3", False, False),
    (r"\sqrt{2}", r"\sqrt{2}+10^{-30}", False, False),
    (r"\sqrt{2}", r"\sqrt{2}+10^{-300}", False, False),
    (r"\sqrt{2}", r"\sqrt{2}+10^{-3000}", False, False),
    (r"\sqrt{2}+10^{-300}", r"\sqrt{2}", False, False),
    (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", True, True),
    (r"\pi", r"\pi+10^{-200}", False, False),
    (r"\pi+10^{-200}", r"\pi+10^{-201}", False, False),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}", False, False),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{6}+\frac{1}{3\cdot 2^{2006}}", True, True),
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}", False, False),
    (r"1-\frac{1}{\mathrm{e}}", r"1-e^{-1}", True, True),
    (r"\pm 2021", r"2021", False, False),
    (r"12:00", r"1:00", False, False),
    (r"12345678901234567890123456789012345678901", r"12345678901234567890123456789012345678902", False, False),
    (r"12345678901234567890123456789012345678901", r"12345678901234567890123456789012345678901", True, True),
    (r"(2^{-99}, 1)", r"(2^{-98}, 1)", False, False),
    (r"\{2^{-99}, 1\}", r"\{1, 2^{-98}\}", False, False),
    (r"\{2^{-99}, 1\}", r"\{1, \frac{1}{2^{99}}\}", False, True),
    (r"[0, e^{-60}]", r"[0, e^{-50}]", False, False),
    (r"[0, e^{-60})", r"[0, \frac{1}{e^{60}})", True, True),
    (r"\begin{pmatrix}1&2^{-99}\\0&1\end{pmatrix}", r"\begin{pmatrix}1&2^{-98}\\0&1\end{pmatrix}", False, False),
    (r"\begin{pmatrix}1&2^{-99}\\0&1\end{pmatrix}", r"\begin{pmatrix}1&\frac{1}{2^{99}}\\0&1\end{pmatrix}", True, True),
    (r"x = 2^{-99}", r"x = 2^{-98}", False, False),
    (r"x = 2^{-99}", r"2^{-98}", False, False),
    (r"2^{-99}", r"x = 2^{-98}", False, False),
    (r"x < e^{-60}", r"x < e^{-50}", False, False),
    (r"x+2^{-99}", r"x+2^{-98}", False, False),
    (r"2^{-99}x", r"2^{-98}x", False, False),
    (r"x^2+10^{-100}", r"x^2", False, False),
    (r"x^2+10^{-100}", r"x^2+10^{-100}", True, True),
    (r"y = x + 10^{-150}", r"y = x + 10^{-151}", False, False),
    (r"0.0000001", r"0.0000002", False, False),
    (r"0.0000001", r"10^{-7}", True, True),
    (r"1.0\times 10^{-20}", r"1.1\times 10^{-20}", False, False),
    (r"1.0\times 10^{-20}", r"1.0005\times 10^{-20}", False, False),
    (r"\frac{1}{3}", r"0.333333", False, True),
    (r"\frac{1}{3}", r"0.3333333", False, True),
    (r"\frac{1}{3}", r"0.333", False, False),
    (r"\pi", r"3.14159265", False, True),
    (r"\pi", r"3.141593", False, True),
    (r"\pi", r"3.14", False, False),
    (r"\ln 2", r"0.693147", False, True),
    (r"e^{-10}", r"0.000045", False, True),
    (r"2^{-100}", r"0.000000", False, False),
    (r"2^{-100}", r"0", False, False),
    (r"0", r"2^{-100}", False, False),
    (r"0", r"0.0", True, True),
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}", True, True),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", True, True),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}+10^{-90}", False, False),
    (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", r"0.5", True, True),
    (r"\sqrt[3]{2+\sqrt{5}}", r"\frac{1+\sqrt{5}}{2}", True, True),
    (r"e^{\pi}", r"e^{\pi}+\frac{1}{10^{85}}", False, False),
    (r"\sqrt{10}", "\u221a10", True, True),
    (r"2\pi", "2\u03c0", True, True),
    (r"-5", "\u22125", True, True),
    (r"3\mathrm{i}+1", r"1+3i", True, True),
    (r"2i", r"-2i", False, False),
    (r"-1+i\sqrt{3}", r"2e^{2\pi i/3}", True, True),
    (r"\tan 2", r"\operatorname{tg} 2", True, True),
    (r"\cot 2", r"\operatorname{ctg} 2", True, True),
    (r"\cot 2", r"\tan 2", False, False),
    (r"\arcsin\frac{1}{3}", r"\text{arcsin}(1/3)", True, True),
    (r"\exp(2)", r"e^2", True, True),
    (r"\binom{10}{3}", r"120", True, True),
    (r"\ln 2", r"\log_e 2", True, True),
    (r"\ln 2", r"\text{ln}\,2", True, True),
    (r"\ln 2", r"\mathrm{ln}(2)", True, True),
    (r"\sin 1", r"\sin 1^\circ", False, False),
    (r"\sin 10^\circ", r"\sin\frac{\pi}{18}", True, True),
    (r"\sin(10^{\circ})", r"\sin 10", False, False),
    (r"3 \times 10^{20}", r"3 \times 10^{20}+1", False, False),
    (r"7^{100}", r"7^{100}+1", False, False),
    (r"7^{1000}", r"7^{1000} - 1", False, False),
    (r"7^{1000}", r"49^{500}", True, True),
    (r"100!", r"99! \cdot 100", False, True),
    (r"100!", r"99!", False, False),
    (r"0.5\%", r"0.005", True, True),
    (r"50\%", r"0.5", True, True),
    (r"e^{100}", r"e^{101}", False, False),
    (r"e^{1000}", r"(e^{10})^{100}", False, False),
    (r"e^{1000}", r"e^{1000}+1", False, False),
    (r"\frac{\pi}{10^{50}}", r"\frac{\pi}{10^{51}}", False, False),
    (r"\sqrt{2} \cdot 10^{-40}", r"\sqrt{3}\cdot 10^{-40}", False, False),
    (r"\cos(10^{-300})", r"1", False, False),
    (r"2004!+2", r"2004!+1", False, False),
    (r"\frac{1}{2004!}+\frac{1}{2005!}", r"\frac{2006}{2005!}", True, True),
    (r"\frac{1}{2004!}", r"\frac{1}{2004!}", True, True),
    (r"1,000,000,000,000,000,000,001", r"1,000,000,000,000,000,000,000", False, False),
    (r"\frac{10^{30}+1}{10^{30}}", r"1", False, False),
    (r"1", r"\frac{10^{30}+1}{10^{30}}", False, False),
    (r"0.1", r"0.1000000000000000000001", False, True),
    (r"(0, 1)", r"(0, 1.5)", False, False),
    (r"n=2,3,4", r"n=1,2,3", False, False),
    (r"\sqrt{x^2+1}", r"\sqrt{1+x^2}", True, True),
    (r"\frac{x}{10^{99}}", r"\frac{2x}{10^{99}}", False, False),
    (r"x \in (0, 2^{-80})", r"(0, 2^{-81})", False, False),
    (r"2^{1/2}", r"\sqrt{2}", True, True),
    (r"\log_2 8", r"3", True, True),
    (r"\log_2 5", r"\frac{\ln 5}{\ln 2}", True, True),
    (r"\log_2 5", r"\frac{\lg 5}{\lg 2}", True, True),
    (r"99999!", r"99999!+1", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("decide", "column"), [(_decide_strictly, 2), (_decide, 3)], ids=["math_strict", "math"])
@pytest.mark.parametrize("pairs", [PAIRS[:20], pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["first", "all"])
def test_pairs(decide, column, pairs):
    assert len(PAIRS) > 110
    wrong = []
    for pair in pairs:
        decided = decide(*pair[:2])
        verdict = decided if isinstance(decided, str) else judge.judge(decided)
        if (verdict == "right") != pair[column]:
            wrong.append((*pair[:2], verdict))
    assert wrong == []


def test_rational_numbers_are_worked_out_within_bounds():
    def unevaluated(kind, *parts):
        return kind(*map(sympy.Integer, parts), evaluate=False)

    assert fraction(unevaluated(sympy.Pow, 7, -2)) == Fraction(1, 49)
    assert fraction(unevaluated(sympy.binomial, 10, 3)) == 120
    assert fraction(unevaluated(sympy.factorial, 5) / unevaluated(sympy.factorial, 7)) == Fraction(1, 42)
    assert fraction(sympy.sqrt(2)) is None
    assert fraction(unevaluated(sympy.Pow, 2, 10**9)) is None
    assert fraction(unevaluated(sympy.factorial, 10**9)) is None
    assert fraction(unevaluated(sympy.Pow, 0, -1)) is None


def test_equal_and_nearly_equal_radicals():
    # sqrt(a) + sqrt(b) against sqrt(a + b + 2 sqrt(ab)), which are equal, and with the last digit of a large b changed.
    a, b = sympy.Integer(3), sympy.Integer(10**40 + 7)
    left = sympy.Add(sympy.sqrt(a), sympy.sqrt(b), evaluate=False)
    assert same(left, sympy.sqrt(a + b + 2 * sympy.sqrt(a * b)))
    assert not same(left, sympy.sqrt(a + b + 2 * sympy.sqrt(a * (b + 1))))
    tiny = sympy.Rational(1, 10**1500)
    assert not same(sympy.sqrt(2), sympy.Add(sympy.sqrt(2), tiny, evaluate=False))
    assert not same(sympy.Mul(sympy.sqrt(2), tiny, evaluate=False), sympy.Integer(0))
    # Too large to tell is not equal.
    huge = sympy.Pow(sympy.E, sympy.Integer(10**6), evaluate=False)
    assert not same(sympy.Add(huge, 1, evaluate=False), sympy.Add(huge, 2, evaluate=False))


def test_roundings():
    third = Fraction(1, 3)
    assert is_rounding(third, Fraction("0.333333"))
    assert is_rounding(third, Fraction("0.33333333333"))
    assert is_rounding(Fraction("0.00123456"), Fraction("0.001235"))
    assert not is_rounding(third, Fraction("0.3333"))
    assert not is_rounding(Fraction("0.0012"), Fraction("0.001"))
    assert not is_rounding(Fraction(1, 10**9), Fraction(0))
    assert not is_rounding(Fraction(1, 10**9), Fraction(-1, 10**9))
    assert not is_rounding(Fraction(1, 10**20), Fraction(2, 10**20))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"\mathrm{e}^2", "e ^2"),
        (r"\operatorname{arctan} 2", r"\arctan 2"),
        (r"\mathop{\rm arctan}2", r"\arctan 2"),
        (r"\lg 2", r"\log_{10} 2"),
        (r"\tg 2", r"\tan 2"),
        (r"\mathrm{arcctg}\,2", r"\arccot 2"),
        ("exp(2)", r"\exp(2)"),
        ("\u221a10", r"\sqrt{10}"),
        ("x\u207b\u00b9\u2070", "x^{-10}"),
        (r"\cos{60^{\circ}}", r"\cos{60\frac{\pi}{180}}"),
        ("5 sec", "5 sec"),
        (r"3 \text{ m}", r"3 \text{ m}"),
    ],
)
def test_one_spelling(written, text):
    assert plain(written) == text
