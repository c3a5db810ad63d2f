"""What `math` takes for the answer of a completion: many ways to end on 73, and texts that hold it and do not."""

from __future__ import annotations

import time

import pytest

from paced_fast.rewards.math import judge
from paced_fast.rewards.math.endings import final_answer
from paced_fast.rewards.math.reward import _decide

ENDINGS = [
    "73", "73.", "**73**", "$73$", r"\[73\]", r"\(73\)", "= 73", "x = 73", "`73`", "```\n73\n```", "The answer is 73",
    "The answer is 73.", "The answer is **73**.", "The answer is $73$.", r"The answer is \(73\).",
    "The answer is `73`.", "The answer is: 73", "The answer is: **73**", "**Answer:** 73", "**Answer: 73**",
    "**Answer**: 73", "Answer: 73", r"ANSWER: \(73\)", "Answer: $73$", "answer = 73", "<answer>73</answer>",
    "<answer> $73$ </answer>", "<answer>\n73\n</answer>", r"<answer>\boxed{73}</answer>",
    "<answer>The answer is 73.</answer>", "<answer>x = 73</answer>", "**Final Answer**\n\n$73$",
    "**Final Answer:** 73", "### Final Answer\n73", "## Answer\n\n**73**", "Final Answer: 73", "Final answer:\n\n73",
    "**Final Answer**\n\n\\[73\\]", "**Final Answer**\n\n\\boxed{73}",
    "Final Answer: The final answer is $73$. I hope it is correct.", "So x = 73.", "So $x = 73$.", "Thus, x = 73",
    "Hence the total is 73.", "Therefore, the value is $73$.", r"Therefore, the value of $x$ is \(73\).",
    "So there are 73 ways.", "Thus, the number of residents who own all four is **73**.", "Therefore, 5 + 68 = 73.",
    "So she has 73 apples left.", "Adding both gives\n\\[73\\]", "Adding both gives\n\\[ x = 73 \\]",
    "Adding both gives\n$$73$$", "Adding both gives\n\\[\n73\n\\]", "Adding both gives\n$$x = 5 + 68 = 73.$$",
    "60 + 13\n= 73", "Adding them\n73", "Adding them\n\n**73**", "Adding them\nx = 73", "#### 73", "We add.\n#### 73",
    "#### $73$", "#### 73\n", "####73", "#### **73**", r"\boxed{73}", r"$\boxed{73}$.",
    r"The final answer is: $\boxed{73}$", r"The final answer is $\boxed{73}$. I hope it is correct.", r"\fbox{73}",
    r"**\boxed{73}**", "<think>Maybe 74? No.</think>\nThe answer is 73.", "<think>74</think>73",
    "<think>\\boxed{74}</think>\n\n**Answer:** 73", "I think it is 74 here...</think>The answer is 73.",
    "The answer is 73 apples.", "The answer is 73 dollars.", "The answer is $73.", r"The answer is \$73.",
    "The answer is $73.00.", r"The answer is 73\text{ cm}.", "The answer is 73 units.",
    "The answer is 73 square units.", "The answer is 73. I hope this helps!", "The answer is 73! \U0001f600",
    "\u2705 Final Answer: **73**", "Answer: 73 \u2705", "The answer is 73.\n\nLet me know if you have questions.",
    "The answer is 73.\n---", "The answer is 73, as required.", "The answer is 73, since 70 + 3 = 73.",
    "The answer is 73 (dollars).", "The answer is 73, which is prime.", "La r\xe9ponse est 73.",
    "R\xe9ponse finale : 73", "La respuesta es 73.", "Respuesta: **73**", "Die Antwort ist 73.",
    "Die Antwort lautet 73.", "Antwort: 73", "A resposta \xe9 73.", "La risposta \xe8 73.",
    "\u041e\u0442\u0432\u0435\u0442: 73", "\u7b54\u6848\u662f 73\u3002", "\u7b54\u6848\uff1a73",
    "\u6240\u4ee5\u7b54\u6848\u662f73\u3002", "The correct answer is 73.", "The final answer is 73",
    "Our answer is 73.", "The answer should be 73.", "The answer equals 73.", "So the answer is simply 73.",
    "The answer is therefore 73.", "The answer to the problem is 73.", "Hence, our final answer is $73$.",
    "This gives an answer of 73.", "Ans: 73", "Ans. 73", "The final result is 73.", "Final result: 73", "Result: 73",
    "Total: 73", "Solution: x = 73", "Step 1: 70 + 2 = 72.\nStep 2: 72 + 1 = 73.\n\nThe answer is 73.",
    "First we get 12. Then 61.\nThe answer is 73.",
    "- 73 = 489 ...(iii)\n\n294 + 489 = 783\n\nThus **73**.\n\n--- \n\n\u2705 Final Answer: **73**",
    "The answer is 74. Wait, that is wrong. The answer is 73.", "\\boxed{74}. Wait, that's wrong. \\boxed{73}",
    "I get \\boxed{74}. No, that's incorrect. The answer is 73.", "The answer is 74, no wait, the answer is 73.",
    "Answer: She has 73 apples left.", "**Answer:** There are 73 of them.", "The answer is x = 73.",
    "Therefore:\n\n$$T = 73$$", "We obtain:\n\\begin{align*}\nx &= 70 + 3 \\\\\n&= 73\n\\end{align*}",
    "The answer is\n\n$$73$$", "The answer is:\n\n\\[ 73 \\]", "The answer is:\n```\n73\n```", "The answer is: '73'.",
    'Answer: "73"', "> **Answer:** 73", "* Answer: 73", "1. **Answer:** 73", "Answer (in dollars): 73",
    "The total number of ways is $73$.", "The value of $x$ is 73.", "2x = 146\nx = 73",
    "\\[2x = 146\\]\n\\[x = 73\\]", "The answer is +73.", "The answer is 73.0.", "answer is 73",
    "The answer is\xa073.", "Answer:73", "the answer: 73.", "THE ANSWER IS 73", "Therefore, the answer is 73. \u25a0",
    "So the final answer is 73 cm.", "Answer: 73 km/h", "The answer is 73 km/h.", "The answer is 73 cm\xb2.",
    "The answer is 73\xb0.", r"The answer is $\textbf{73}$.", r"The answer is $\mathbf{73}$.",
    r"The answer is \textbf{73}.", "Answer \u2192 73", "=> 73", "\u2234 x = 73", "The answer is 73.</s>",
    "The answer is 73<|im_end|>", "The answer is 73.<|endoftext|>", "`Answer: 73`", "***73***", "__73__",
    "The answer is (73).", r"The answer is $73 \text{ dollars}$.", r"\[\text{Answer: } 73\]", r"$\text{Answer} = 73$",
    "Answer\n------\n73", "We add.\n\n### 73", '{"answer": 73}', '{"answer": "73"}', r"\[ \therefore x = 73 \]",
    "So it's 73.", "So, 73.", "Thus 73.", "Therefore 73", "So we get 73.", "So we get 73 as the answer.",
    "73 is the answer.", "Hence 73 is the answer.", "Hence, the answer comes out to 73.", "The answer comes to 73.",
    "My answer is 73.", "I believe the answer is 73.", "So after 5 days, the total is 73.",
    "Thus the 5th number is 73.", "Therefore, the sum of 70 and 3 is 73.", "Therefore $a + b = 70 + 3 = 73$.",
    r"Thus $m+n=\boxed{73}$.", "Hence the value of $f(5)$ is $73$.", "**The answer is 73.**", "***Answer: 73***",
    "*Answer:* 73", "__Answer__: 73", "### Answer: 73", "### **Answer:** 73", "**Answer**\n73", "**Answer:**\n\n73",
    "**Answer:**\n$$73$$", "Final Answer\n\n73", "FINAL ANSWER: 73", "final answer: 73",
    "The final answer is **$73$**.", "The final answer is **73** apples.",
    "The final answer is\n\\[\n\\boxed{73}\n\\]", "Final Answer: $x = 73$", r"Final Answer: \[73\]",
    r"Answer: \[ x = 73 \]", "Answer: **73** \U0001f389", "Answer: 73 (verified)",
    "Answer: 73.\n\nCheck: 70 + 3 = 73.", "The answer is 73.\n\n**Verification:** 70 + 3 = 73, so it holds.",
    "The answer is 73.\n\nExplanation: we add 70 and 3.",
    "<think>\nHmm, 70+3.\n</think>\n\nTo solve this we add 70 and 3.\n\n**Answer:** 73",
    "<think>a</think>\n\nAdding 70 and 3 gives $70 + 3 = 73$.\n\n**73**", "<think>a</think><answer>73</answer>",
    "<thinking>a</thinking>\n73", "<answer>\n\\[73\\]\n</answer>", "<answer>**73**</answer>",
    "<answer>Answer: 73</answer>", "<answer> 73 apples </answer>", "<answer>73.</answer>", "<answer>73",
    "<ANSWER>73</ANSWER>", "The answer is 73 because 70 + 3 = 73.", "The answer is 73 as 70 + 3 = 73.",
    "The answer is 73; we are done.", "Answer: 73, i.e. 70 + 3.", "The answer is exactly 73.",
    "The answer is just 73.", "The answer is indeed 73.", "The answer will be 73.", "The answer must be 73.",
    "The answer would be 73.", "The answer to this question is 73.", "The answer to the question is: 73",
    "The answer for the problem is 73.", "The correct answer: 73", "Correct answer: 73", "The required answer is 73.",
    "The answer we want is 73.", "The answer, then, is 73.", "Therefore, the answer is: 73.",
    r"Therefore, the answer is $\displaystyle 73$.", "So the answer is $n = 73$.", "So $n=73$ is the answer.",
    "Thus, the minimum value is $73$.", "Hence the maximum is $73$.", "Thus the smallest such $n$ is $73$.",
    "Therefore, at the end, John has 73 marbles.", "In total, she has 73 marbles.",
    "Altogether there are 73 marbles.", "In conclusion, there are 73 marbles.", "Finally, we get 73.",
    "So John needs to pay $73.", "Thus, she earned $73 in total.", "So the bill is $73.00.", "Total cost: $73",
    "Total = 73", "Sum: 73", "Therefore:\n73", "So:\n$$73$$", "Thus we have\n$$x=73.$$", "= 70 + 3 = 73",
    "70 + 3 = 73", "x = 70 + 3 = 73", r"\begin{align}x&=70+3\\&=73\end{align}",
    "$$\n\\begin{aligned}\nx &= 70 + 3 \\\\\n&= 73\n\\end{aligned}\n$$", "La r\xe9ponse finale est 73.",
    "La respuesta final es 73.", "Die L\xf6sung ist 73.", "\u7b54\u6848\u4e3a\uff1a73",
    "\u56e0\u6b64\uff0c\u7b54\u6848\u662f $73$\u3002", "\u6700\u7ec8\u7b54\u6848\uff1a**73**",
    "\u7b54\u3048\u306f73\u3067\u3059\u3002", "\uc815\ub2f5: 73", "\u7b54\uff1a73",
]  # fmt: skip

TRAPS = [
    "The answer is 73 or 74.", "73 or 74", "The answer is 72 or 73.", "The answer is either 73 or 74.",
    "The answer is not 73.", "73, 74, 75", "72, 73", "The answer is 72, 73, or 74.", "Answer: 73, 74",
    "<answer>73, 74</answer>", "<answer>73 or 74</answer>", "<answer>72</answer><answer>74</answer>",
    r"\boxed{73} or \boxed{74}", r"\boxed{72} or \boxed{73}", r"\boxed{72}, \boxed{73}",
    r"Either \boxed{72} or \boxed{73}.", r"\boxed{72} \boxed{73}", r"\boxed{73}, no, \boxed{74}", r"\boxed{72, 73}",
    r"$\boxed{72}$ and $\boxed{73}$", "Is the answer 73?", "Is 73 the answer?", "The answer is 73?",
    "Could the answer be 73?", "What is the answer: 73?", "So is x = 73?", "We have 73 apples. The answer is 74.",
    "There are 73 in step one.\n#### 74", "x = 73\nThe answer is 74.", "73\nThe answer is 12.", "step 73",
    "Step 73: done", "So we go to step 73.", "So by equation 73.", "See page 73.", "On July 4, 1973, it rained.",
    "In 73 days we will know.", "The year was 73 BC.", "The answer is", r"The answer is \boxed{73",
    "So the total is 73 +", "So x = 73 + ", "The answer is 7", "We now compute 73", "So we have 70 + 3",
    "Let x = 73.", "Suppose x = 73.", "If x = 73 then we are done.", "So let's try x = 73.", "maybe 73 maybe 74",
    "Maybe the answer is 73. Maybe the answer is 74.", "It might be 73.", "The answer is maybe 73, maybe 74.",
    "I guess 73 or 74.", "The answer could be 73 or 74.", "The answer is probably 72, but perhaps 73.",
    "<think>The answer is 73.</think>", "<think>The answer is 73.</think> I do not know.", "<think>The answer is 73.",
    r"<think>\boxed{73}", "<think>73</think>\nThe answer is 74.", "<think>\\boxed{73}</think>\nThe answer is 74.",
    "The answer is 73. Wait, that is wrong, it is 74.", "\\boxed{73}. Wait, that's wrong. It should be 74.",
    "The answer is 73. No, that's incorrect.", "The answer is 73. Actually, the answer is 74.",
    r"\boxed{73}. Oops, I made a mistake: the answer is 74.", "#### 73\nScratch that.\n#### 74",
    "The answer is 73. Or 74.", "The answer is 73. Alternatively, 74.", "The answer is 72. The answer is 73.",
    "The answer is 72.\nThe answer is 73.\nThe answer is 74.", "#### 72\n#### 73", "Answer: 72\nAnswer: 73", "72\n73",
    "72\n73\n74", "x = 72\nx = 73", "1. 72\n2. 73", "- 72\n- 73", "Option A: 72\nOption B: 73",
    "Case 1: 72\nCase 2: 73", "So x is not 73.", "So x is at least 73.", "Thus x is more than 73.",
    "So there are between 70 and 73.", "So it is about 73 or so.", "Therefore, x < 73.", "Thus x \\ne 73.",
    "So the answer is negative 73.", "The answer is -73.", "The answer is 73 thousand.", "The answer is 730.",
    "The answer is 73.5.", "The answer is 1/73.", "The answer is 73x.", "The answer is 73 million.",
    "The answer is 73 and 74.", "So 72 and 73 are the answers.", "The answers are 72 and 73.",
    "I cannot solve this. 73 is a nice number.", "Numbers: 71 72 73 74", "71 72 73", "The answer is 73 71", "73 = 73",
    "The answer is x.", "She earns $73.", "The answer is between 72 and 73.", "The answer is less than 73.",
    "The first term is 73.", "The answer is 74, not 73.", "The answer is 74 (not 73).",
    "The answer is 74 since 73 + 1 = 74.", "So 73 + 1 = 74.", "Therefore 73 is too small.",
    "Therefore 73 people need 74 chairs.", "The answer is 73 if n is even.", "The answer is 73 or so.",
    "The answer is 73 unless x = 0.", "The answer is at least 73.", "The answer is at most 73.",
    "The answer is greater than 73.", "The answer is not 73 but 74.", "The answer isn't 73.",
    "The answer cannot be 73.", "The answer can't be 73.", "The answer is neither 73 nor 74.",
    "The answer is 73 plus 1.", "The answer is 73 + 1.", "The answer is 73^2.", r"The answer is $\frac{73}{2}$.",
    r"The answer is $\sqrt{73}$.", "The answer is 2 x 73.", "The answer is 73 hundred.", "The answer is 73 squared.",
    "The answer is half of 73.", "The answer is twice 73.", "The answer is 73/74.", "The answer is 73:74.",
    "The answer is [73, 74].", "The answer is {73, 74}.", "The answer is (73, 74).", "The answer is 73 / 74.",
    "The answer is 7 3.", "The answer is 0.73.", "The answer is 73.1.", "The answer is 1.73.", "The answer is 173.",
    "The answer is 737.", "The answer is 73e2.", "The answer is 73,000.", "First guess: 72\nSecond guess: 73",
    "Guess 1: 72. Guess 2: 73.", "Possible answers: 72, 73, 74", "Possible answers are 72 and 73.", "Answers: 72, 73",
    "Answer: 72; 73", "Answer: 72/73", "Answer 1: 72\nAnswer 2: 73", "Answer: 72 | 73", "Answer: 72 73",
    "Answer: one of 72, 73, 74", "Answer: any of 73, 74", "Answer: 73?", "Answer: 73 (or 74)",
    "Answer: 73 (maybe 74)", "Answer: maybe 73", "Answer: not 73", "Answer: 73 or", "Answer: 73, or 74",
    "Answer: 73\nor 74", "Answer: 73\n\nor 74", "Answer: 73\nAnswer: 74", "Answer: 74\nAnswer: 73\nAnswer: 72",
    "Final answer: 72\nFinal answer: 73", "The answer is 72. Or maybe the answer is 73.",
    "The answer is 72, or the answer is 73.", "Perhaps the answer is 72. Perhaps the answer is 73.",
    "If x is odd, the answer is 73. Otherwise the answer is 74.", "<answer>72</answer> <answer>73</answer>",
    "<answer>71</answer>\n<answer>72</answer>\n<answer>73</answer>", "<answer>not 73</answer>",
    "<answer>73?</answer>", "<answer>maybe 73</answer>", "<answer></answer> 73", "<answer>73 74</answer>",
    "<answer>I don't know, 73 or 74</answer>", "<think>The answer is 73</think>\n<answer></answer>",
    "<think>73</think>", "<think>So x = 73.</think>", "<think>\n\\boxed{73}\n</think>\nI am not sure.",
    "I think 73.\n<think>", r"\boxed{72}\boxed{73}", r"\boxed{72}; \boxed{73}", r"\boxed{73} / \boxed{74}",
    r"\boxed{73}, \boxed{74}, \boxed{75}", r"$\boxed{73}$ $\boxed{74}$", "\\boxed{72}\n\\boxed{73}",
    r"\boxed{73 \text{ or } 74}", r"\boxed{\boxed{72}, \boxed{73}}", r"\boxed{73?}", r"\boxed{\text{not } 73}",
    "\\boxed{73 \\ne 74}", r"\boxed{}", r"\boxed{?}", r"The answer is \boxed{}. 73",
    r"\boxed{74}. Earlier we had 73.", r"\boxed{73}. The answer above is wrong.", "\\boxed{73}... no, it's 74.",
    r"\boxed{73}. Hmm, wait, no. It should be 74.", "\\boxed{73}. I'm not sure.",
    "The answer is 73. But this is wrong.", "The answer is 73. I am not sure.", "The answer is 73. Correction: 74.",
    "The answer is 73. Oops, 74.", "The answer is 73... no, actually 74.", "We tried 73. It failed.",
    "73 does not work.", "73 is wrong.", "x = 73 is not a solution.", "So 73 does not work.",
    "Thus 73 is impossible.", "So 73 is not the answer.", "Hence 73 cannot be.", "Therefore we reject 73.",
    "So we need 73 more.", "So consider 73.", "So, what about 73?", "So it could be 73.", "Thus it may be 73.",
    "So maybe 73.", "So perhaps x = 73.", "Then x = 73 would imply a contradiction.",
    "Thus x = 73 leads to a contradiction.", "So x = 73 or x = 74.", "So x = 72, 73.", "So x = 73 and y = 74.",
    "Thus x = 72 and x = 73.", "So x is 72 or 73.", "Thus there are 72 or 73.", "So 72, 73, 74.",
    "Therefore 72 < x < 74, 73", "So x > 73.", r"So $x \ge 73$.", r"Thus $x \approx 73$ or $74$.",
    "In step 73 we stop.", "Finally, go to step 73.", "So (73) holds.", "From (73) we see it.", "By Theorem 73.",
    "Problem 73", "Question 73:", "73)", "Chapter 73\nThe end.", "Date: 73 May", "12/31/73", "Page 73", "Room 73",
    "Version 73", "The time is 12:73", "Let n be 73. Then", "We know 73 is prime.", "Note that 73 is prime.",
    "So 73 is prime.", "Now 73 = 70 + 3.", "Thus 73 = 70 + 3 is prime.", "Check: 73", "Hint: 73", "Note: 73",
    "Guess: 73", "Estimate: 73", "Approximate answer: 70 to 75", "There are 100 apples and 73 pears.",
    "Thus there are 100 apples and 73 pears.", "72 or 73?", "72? 73? 74?", "It's 72. It's 73. It's 74.",
]  # fmt: skip


def verdict(gold: str, completion: str) -> str:
    """As the reward has it, without its workers."""
    decided = _decide(gold, final_answer(completion))
    return decided if isinstance(decided, str) else judge.judge(decided)


def test_usual_endings_are_read():
    assert len(ENDINGS) >= 280
    assert [text for text in ENDINGS if verdict("73", text) != "right"] == []


def test_what_commits_to_nothing_or_to_something_else_is_not():
    assert len(TRAPS) >= 270
    assert [text for text in TRAPS if verdict("73", text) == "right"] == []


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is $3$ and $5$.", "3 and 5"),
        (r"$\boxed{3}$, $\boxed{5}$ and $\boxed{7}$", "3, 5, 7"),
        ("The answer is $x = 2$ or $x = -1$.", "x = 2 or x = -1"),
        (r"The answer is $\left(-\frac{1}{2}, 3\right)$.", r"\left(-\frac{1}{2}, 3\right)"),
        ("The answer is $10!$.", "10!"),
        ("The answer is (B).", "(B)"),
        ("The answer is Tuesday, because it rains.", "Tuesday"),
        ("Hence the line is $y = 2x + 3$.", "y = 2x + 3"),
        (r"Thus \[ \frac{1}{2} + \frac{1}{3} = \frac{5}{6}. \]", r"\frac{5}{6}"),
        ("<think>5</think>", ""),
        ("<think>It is 5, I think.", ""),
        ("We add and subtract.\nNothing follows.", ""),
        (r"\boxed{5", ""),
        (r"\boxed{4} and then \boxed{5", ""),
    ],
)
def test_what_is_handed_on(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "text",
    [
        *("<think>" * 20_000, "<answer>" * 20_000, "the answer is " * 8_000, "####" * 25_000, r"\boxed{" * 15_000),
        *(
            "*" * 100_000,
            " " * 100_000 + "x",
            "=" * 100_000,
            "$" * 100_000,
            "So 5 = " * 15_000,
            "answer" + " " * 100_000,
        ),
        *(r"\boxed{5} " * 10_000, r"\boxed{1}" + "," * 100_000 + r"\boxed{2}", "<|x|>" * 20_000, "-\n" * 50_000),
        *("The answer is " + "(" * 100_000, r"\[" * 50_000, "```\n" * 30_000, "a." * 50_000, "no, " * 25_000),
    ],
)
def test_long_texts_are_read_at_once(text):
    start = time.process_time()
    final_answer(text)
    assert time.process_time() - start < 1
