"""Endings of `math` on answers of every kind: fractions, choices, lists, words, times, quantities, sums worked out."""

from __future__ import annotations

import pytest

from paced_fast.rewards.math import judge
from paced_fast.rewards.math.endings import final_answer
from paced_fast.rewards.math.reward import _decide


def verdict(gold: str, ending: str) -> str:
    """As the reward has it after a line of reasoning, without its workers."""
    decided = _decide(gold, final_answer(f"We add the parts up step by step.\n{ending}"))
    return decided if isinstance(decided, str) else judge.judge(decided)


RIGHT = {
    "3/4": [r"So the probability is $\dfrac{3}{4}$.", r"The fraction is $\frac{6}{8} = \frac{3}{4}$."],
    "-5": [r"Therefore $x = -5$ is the solution.", "Thus, x equals -5."],
    "B": [
        "The correct option is B.", "The correct choice is **B**.", "So the correct answer is option B.", "**B**",
        "Option B", "(B)",
        "So the answer is choice B.", "The answer is B) 15.", "Answer: (B) None of the above", "The answer is B: 15",
        "**B) 15**",
        "Hence the correct option is (B).", r"The answer is $\textbf{(B)}$.",
    ],
    "(3,-4)": ["The coordinates are (3, -4).", "So the point is $(3, -4)$.", r"Therefore $(a, b) = (3, -4)$."],
    r"\left(3, \frac{1}{2}\right)": [r"The ordered pair is $\left(3, \frac{1}{2}\right)$."],
    "1,2": [
        "The solutions are 1 and 2.", "So the solutions are 1 and 2.", r"\boxed{1} and \boxed{2}",
        "Therefore the roots are $x = 1$ and $x = 2$.", "Thus $x = 1$ or $x = 2$.",
    ],
    r"\{1,2\}": [r"The values are $\{1, 2\}$."],
    "73": [
        r"So $m+n = 73$.", "Thus, m+n = 73.", "m + n = 73", r"$m+n=73$", r"The requested sum is $m+n = 73$.",
        r"Therefore $100m+n = 73$.", r"So $|z|^2 = 73$.", r"Thus $f(3) = 73$.", r"So $AB = 73$.",
        r"Hence $\overline{abc} = 73$.", r"Thus $a_{10} = 73$.", r"So $AB^2 = 73$.", r"So $\angle ABC = 73^\circ$.",
        r"So $[ABC] = 73$.", r"\boxed{m+n=73}", "The area of the triangle is 73.", "The measure is 73\N{DEGREE SIGN}.",
        "In total, there are 43 + 30 = 73 birds.", "She gave 7 of 80 away, so she has 73 apples left.",
        "Natalia sold 48+25 = <<48+25=73>>73 clips altogether in April and May.", "She has 73 dollars left.",
        "Working 50 minutes, she earned 1.46 x 50 = $<<1.46*50=73>>73.", "Therefore, John needs **73** more apples.",
        "That's 73 in all.", "Answer - 73", r"\boxed{73_{10}}", "The answer is 73 m.",
        "In conclusion, Kylar needs to pay **$73** for the 16 glasses.", "Area = 7.3*10 = 73 sq ft",
    ],
    r"16\pi": [r"The answer is 16\pi square cm.", "So the area is 16\N{GREEK SMALL LETTER PI}."],
    "x^2+y^2=25": [r"The equation is $x^2+y^2=25$."],
    "y=2x+3": [r"The line is $y = 2x + 3$."],
    r"\frac12": [r"So $\cos\theta = \frac{1}{2}$."],
    "Monday": ["So the day is Monday.", "The answer is Monday.", "**Monday**", "Thus the day is **Monday**."],
    r"3:30 \text{ PM}": ["The answer is 3:30 PM.", "The answer is 3:30 p.m.", r"\boxed{3:30\text{ p.m.}}",
    "So they meet at 3:30 PM."],
    "March 5": ["Answer: March 5", "The answer is March 5."],
    r"3\times 10^8": ["The answer is 3 x 10^8."],
}  # fmt: skip

WRONG = {
    "73": [
        "Suppose the answer is 73.", "Let's say the answer is 73.", r"\boxed{\neg 73}", "The answer is 73_8.",
        "So we have 73 equations to solve.", "The answer depends on 73.", "The answer is the square of 73.",
        "The answer is a multiple of 73.", "The answer is in part 73.", "Options: 73", "Candidates: 73",
        "So $2x = 73$.", "So $n + 1 = 73$.", "So $x^2 = 73$.", "So $y = x + 73$.", r"\boxed{2x=73}",
        "So the solutions are 72 and 73.", "The values are 72, 73.", "Tom has 5 + 67 = 72 and Ann has 70 + 3 = 73.",
        "In total, there are 70 + 3 = 73 or 72 birds.", "There are 70 + 3 = 73 birds, which is wrong.",
        "Thus we first compute 70 + 3 = 73.", "She has 73 apples or 72 left.", "The first part is 73.",
        "The train of 73 is late.", "The 73 birds are sad.", "So she has 73 apples. Or 72.", r"So $x+y = 73k$.",
        "So 80 - 7, so not 73.", "She has more than 73 left.", "The cost is 73 a day for 3 days.",
        "He left at 73.", "So an upper bound is 73.", "So n is divisible by 73.", "**73** is wrong.",
    ],
    "B": [
        "The correct option is A or B.", "The correct option is not B.", "The answer is A) B",
        "The answer is A) 5 B) 6", "The answer is B) or C)", "**A**\n**B**", "A) 72\nB) 73",
        "So option B can be excluded.",
    ],
    "3:30 PM": ["The answer is 3:30 AM.", "The answer is 4:30 PM."],
    "March 5": ["Answer: March 6", "Answer: May 5", "Answer: 5"],
    "Monday": ["So the day is Tuesday.", "So the day is not Monday.", "So is the day Monday?"],
    "1,2": ["The solutions are 1, 2 and 3.", "The solution is 1."],
    "x^2+y^2=25": ["So $x^2+y^2 = 24$.", "So the answer is 25."],
    "(3,-4)": ["The coordinates are (-4, 3).", "The coordinates are 3 and 4."],
}  # fmt: skip


@pytest.mark.parametrize("gold", RIGHT)
def test_answers_of_every_kind_are_read(gold):
    assert [ending for ending in RIGHT[gold] if verdict(gold, ending) != "right"] == []


@pytest.mark.parametrize("gold", WRONG)
def test_what_is_no_answer_or_another_is_not(gold):
    assert [ending for ending in WRONG[gold] if verdict(gold, ending) == "right"] == []
