r"""Verifiers: completion text -> reward in [0, 1], or None where there is no verdict.

A reward function has TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`: every column of the
data rows is a list aligned with the completions, which are plain text. Without `**columns` it gets those it names.

Async functions with the same signature wait together.
A callable object may have, besides: `problem(columns) -> str | None`, what keeps a row from ever being judged, asked
when the data are read, of the columns and the `prompt`; `counts`, a Counter of verdicts by kind; `close()`.

    exact            the text is the answer, white space aside; numbers by value (43 is 43.0)
    number           the last number of the text is the answer
    math             math-verify on what the text commits to at its end: a box, "the answer is", a closing sentence
    math_strict      one value in the last \boxed{}, written out and exactly the answer; the rules are in `math`
    code             a program that passes all tests of its row, run in a sandbox
    reasoning_gym    the rule of the row's task: our own, or the package's checker in a sandbox (`task_rules`)
    signed_sums      the exact checker of that task
    package.module:function, path/to/file.py:function
    verl:..., trl:...  functions written for those trainers (see `foreign`)
    0.7*math+0.3*exact a weighted mean of several
"""

from paced_fast.rewards.loading import RewardFunction, load_reward
from paced_fast.rewards.scorer import Scorer
from paced_fast.rewards.shaping import Shaper
from paced_fast.rewards.text import last_number

__all__ = ["RewardFunction", "Scorer", "Shaper", "last_number", "load_reward"]
