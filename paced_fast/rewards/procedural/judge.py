"""The program that asks a checker of reasoning-gym about one text; it runs in a sandbox, and only there.

Its process is made for one text and ends with it. Run as a file, without the package: a sandbox has no torch.
"""

from __future__ import annotations

import sys
from typing import Any

sys.setrecursionlimit(1000)
sys.set_int_max_str_digits(4300)


def judge(task: str, settings: dict[str, Any], entry: dict[str, Any], text: str) -> float:
    """What the checker of the data set `task`, made with `settings`, gives `text` for the problem `entry`."""
    from reasoning_gym.factory import DATASETS

    make_dataset, make_config = DATASETS[task]
    return float(make_dataset(config=make_config(**settings)).score_answer(text, entry))
