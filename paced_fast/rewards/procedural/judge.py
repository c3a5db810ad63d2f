"""Program that scores one text with a checker of reasoning-gym; it runs only in a sandbox.

Each text has its own process. The program runs as a file, without the package: a sandbox has no torch.
"""

from __future__ import annotations

import sys
from typing import Any

sys.setrecursionlimit(1000)
sys.set_int_max_str_digits(4300)


def judge(task: str, settings: dict[str, Any], entry: dict[str, Any], text: str) -> float:
    """Return the score of `text` for the problem `entry` by the checker of data set `task`, made with `settings`."""
    from reasoning_gym.factory import DATASETS

    make_dataset, make_config = DATASETS[task]
    return float(make_dataset(config=make_config(**settings)).score_answer(text, entry))
