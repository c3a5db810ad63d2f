r"""Verifiers: completion text -> reward in [0, 1], or None if the verifier cannot decide.

A reward function has TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`. Completions are plain
text; each column of the data rows is a list with one entry per completion. A function without `**columns` receives only
the columns that its parameters name. Async functions have the same signature and run concurrently.

A callable object may also define `problem(columns) -> str | None`, which returns the reason why a row can never be
judged (called when the data are read, with the row's columns and its `prompt`); `counts`, a Counter of verdicts by
kind; and `close()`.

    exact                     the text is the answer; white space is ignored, numbers compare by value (43 equals 43.0)
    number                    the last number in the text is the answer
    math                      the final answer of the text (in \boxed{}, after "the answer is", or in a closing
                              sentence) equals the answer according to math-verify; formatting and units are ignored
    math_strict               the last \boxed{} of the text holds one value, written out, that is exactly the answer:
                              1/3, not 0.333; 5, not 10/2
    code                      the program in the text passes all tests of its row; it is run in a sandbox
    reasoning_gym             the answer solves the task of its row; the default of sources rg:TASK
    signed_sums               the text is an expression that makes the number of its row; the default of
                              task:signed_sums
    file.py:function          a function of yours, from a file
    package.module:function   a function of yours, from an installed package
    verl:file.py:function     a function written for verl, with the signature of `compute_score`
    trl:file.py:function      a function written for TRL that takes completions as lists of messages; one that takes
                              texts needs no `trl:`
    0.7*math+0.3*exact        the weighted mean of several rewards
"""

from paced_fast.rewards.loading import RewardFunction, load_reward
from paced_fast.rewards.scorer import Scorer
from paced_fast.rewards.shaping import Shaper
from paced_fast.rewards.text import last_number

__all__ = ["RewardFunction", "Scorer", "Shaper", "last_number", "load_reward"]
