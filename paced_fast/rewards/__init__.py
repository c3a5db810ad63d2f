r"""Verifiers: completion text -> reward in [0, 1], or None if the verifier cannot decide.

A reward function has TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`. Completions are plain
text; each column of the data rows is a list with one entry per completion. A function without `**columns` receives only
the columns that its parameters name. Async functions have the same signature and run concurrently.

A callable object may also define `problem(columns) -> str | None`, which returns the reason why a row can never be
judged (called when the data are read, with the row's columns and its `prompt`); `counts`, a Counter of verdicts by
kind; and `close()`.

    exact            the text equals the answer; white space is ignored, numbers compare by value (43 is 43.0)
    number           the last number of the text is the answer
    math             math-verify on the final answer of the text: a box, "the answer is", a closing sentence
    math_strict      one value in the last \boxed{}, written out and exactly the answer; see `math.reward`
    code             a program that passes all tests of its row, run in a sandbox
    reasoning_gym    our own rule for the row's task, or the package's checker in a sandbox; see `procedural.rules`
    signed_sums      the exact checker of that task
    file.py:function          your own; package.module:function too
    verl:file.py:function     a function written for verl, `compute_score`
    trl:file.py:function      a function written for TRL that expects chats (see `foreign`)
    0.7*math+0.3*exact        a weighted mean of several
"""

from paced_fast.rewards.loading import RewardFunction, load_reward
from paced_fast.rewards.scorer import Scorer
from paced_fast.rewards.shaping import Shaper
from paced_fast.rewards.text import last_number

__all__ = ["RewardFunction", "Scorer", "Shaper", "last_number", "load_reward"]
