"""Load the function of a reward by its name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from paced_fast.config import RewardConfig, given
from paced_fast.config.reward_names import check_name, no_file, no_function, without_function
from paced_fast.errors import InputError
from paced_fast.rewards.code.reward import CodeReward
from paced_fast.rewards.foreign import TRLChatReward, VerlReward
from paced_fast.rewards.math.reward import MathReward
from paced_fast.rewards.procedural.reward import ReasoningGymReward, signed_sums
from paced_fast.rewards.text import exact, number

RewardFunction = Callable[..., Sequence[float | None]]

GIVEN = given.REWARD
"""Prefix of the name of a function that Python handed over and that is in no file."""

TARGETS = ("signed_sums",)
"""Rewards for which a row's answer is what a completion must come to, not what it must say."""


def load_reward(
    name: str, settings: RewardConfig | None = None, functions: Mapping[str, RewardFunction] | None = None
) -> RewardFunction:
    """Return the reward function with that name or import path; `settings` is for those with workers or a sandbox.

    `functions` are those that are in memory already, by name; they come before any that could be loaded.

    Raises:
        InputError: there is no such name (the message gives the nearest match), module, file or function.
    """
    settings = settings or RewardConfig()
    if functions is not None and name in functions:
        return functions[name]
    check_name(name)
    if name in ("math", "math_strict"):
        return MathReward(settings, strict=name == "math_strict")
    if name == "code":
        return CodeReward(settings)
    if name == "reasoning_gym":
        return ReasoningGymReward(settings)
    if plain := {"exact": exact, "number": number, "signed_sums": signed_sums}.get(name):
        return plain
    for prefix, adapter in (("verl:", VerlReward), ("trl:", TRLChatReward)):
        if name.startswith(prefix):
            return adapter(name, import_function(name.removeprefix(prefix), "reward"))
    return import_function(name, "reward")


def import_function(name: str, kind: str) -> RewardFunction:
    """Return the function at `package.module:function` or `path/to/file.py:function`; messages call it `kind`.

    Raises:
        InputError: there is no such module, file or function, or importing the module fails.
    """
    if name.removesuffix(":").endswith(".py"):
        raise without_function(name, kind)
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise InputError(f"{kind} {name!r} is neither package.module:function nor path/to/file.py:function")
    function: Any = getattr(_import(module_name, f"{kind} {name!r}"), function_name, None)
    if not callable(function):
        raise no_function(f"{kind} {name!r}", module_name, function_name)
    if isinstance(function, type):
        raise InputError(f"{kind} {name!r} is a class: name an instance of it, created in {module_name}")
    return cast(RewardFunction, function)


def _import(module_name: str, who: str) -> Any:
    try:
        if not module_name.endswith(".py"):
            return importlib.import_module(module_name)
        path = Path(module_name).expanduser()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise no_file(who, module_name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's module runs here
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{who}: cannot import {module_name!r}: {reason}") from error
