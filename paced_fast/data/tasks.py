"""Procedural tasks: problems generated at run time, with an exact verifier, so that a run needs no download.

`signed_sums` is the small task of the `tiny` preset. A prompt such as ` 1951=2:` gives shuffled digits and a target;
any expression that uses each digit once with + and - and reaches the target is right, here `9-5-1-1`. No sum of six
digits reaches a target of 100 or more: there, and only there, `*` is allowed. `reasoning_gym` rows come from the
package of that name; they are scored by `rewards.procedural`.

k = digits in a problem, n = problems drawn at once.
"""

from __future__ import annotations

import itertools
import logging
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paced_fast.errors import InputError, nearest

logger = logging.getLogger(__name__)

SIGNED_SUMS_ALPHABET = " 0123456789+-*=:#"
SIGNED_SUMS_PAD = " "
SIGNED_SUMS_STOP = "#"
SIGNED_SUMS_PROMPT_LENGTH = 12
DEMONSTRATION_WEIGHTS = (0.04, 0.22, 0.28, 0.25, 0.13, 0.08)
"""Share of demonstrations with 1 to 6 digits."""

_TRAIN_SIZE = 4000
_TRAIN_WEIGHTS = {"trivial": 0.4, "k3": 0.05, "k4": 0.05, "k5": 0.05, "k6": 0.05, "hard": 0.4}
_EVAL_COUNTS = {"trivial": 32, "k3": 40, "k4": 40, "k5": 40, "k6": 40, "hard": 32}
_EVAL_SEED = 20260212
_FIRST_PRODUCT_TARGET = 100
_LAST_TARGET = 999
_PLUS, _MINUS, _TIMES = 0, 1, 2
_SYMBOLS = np.frombuffer(b"+-*", dtype=np.uint8)

Ints = NDArray[np.int64]
Row = dict[str, Any]


def signed_sums_rows(split: Literal["train", "eval"], *, size: int | None = None, seed: int = 42) -> list[Row]:
    """The problems of one split as rows with prompt, answer, slice and reward, in a mixed order.

    The train split has 40 % trivial problems (1 digit; 2 digits with +, twice as likely), 5 % each of 3 to 6 digits
    with + and -, and 40 % that need `*`; 4000 rows unless `size` says otherwise. The eval split is the same for every
    seed: 224 rows, or `size` of them in the same mix. No problem of three digits or more is in both splits: the same
    digits in any order with the same target count as the same problem.

    Raises:
        InputError: unknown split, or a size that the split cannot have.
    """
    if split == "eval":
        return _eval_rows(size)
    if split != "train":
        raise InputError(f"signed_sums has no split {split!r}: use 'train' or 'eval'")
    size = _TRAIN_SIZE if size is None else size
    if size < 1:
        raise InputError(f"signed_sums needs size >= 1, not {size}")
    rng = np.random.default_rng([seed, 0])
    counts = dict(zip(_TRAIN_WEIGHTS, _shares(size, list(_TRAIN_WEIGHTS.values())), strict=True))
    excluded = _eval_keys()
    rows: list[Row] = []
    for slice_name, count in counts.items():
        for k, part in _digits_of_slice(rng, slice_name, count):
            digits, _, target = _draw(rng, part, k, _symbols_of_slice(slice_name), excluded)
            rows += _rows(_prompts(rng, digits, target), target, slice_name)
    return [rows[i] for i in rng.permutation(len(rows))]


def signed_sums_demonstrations(
    *,
    size: int,
    seed: int = 42,
    slice_weights: Sequence[float] = DEMONSTRATION_WEIGHTS,
    flip_probability: float = 0.0,
) -> list[Row]:
    """Problems with a worked expression each, for the supervised warm start; none of them is an eval problem.

    `slice_weights` are the shares of problems with 1 to 6 digits. With `flip_probability` one sign of a demonstration
    of three digits or more is flipped, which makes it wrong: a skill left for reinforcement to recover.

    Raises:
        InputError: a size below one, weights that are not six shares, or a probability outside [0, 1].
    """
    if size < 1:
        raise InputError(f"signed_sums demonstrations need size >= 1, not {size}")
    if len(slice_weights) != 6 or min(slice_weights) < 0 or not sum(slice_weights) > 0:
        raise InputError(f"slice_weights must be six shares >= 0, for 1 to 6 digits, got {tuple(slice_weights)}")
    if not 0 <= flip_probability <= 1:
        raise InputError(f"flip_probability must be in [0, 1], got {flip_probability}")
    rng = np.random.default_rng([seed, 1])
    excluded = _eval_keys()
    rows: list[Row] = []
    for k, count in enumerate(_shares(size, slice_weights), start=1):
        digits, symbols, target = _draw(rng, count, k, 2, excluded)
        prompts = _prompts(rng, digits, target)
        if k >= 3:
            flipped = rng.random(count) < flip_probability
            column = rng.integers(0, k - 1, size=count)
            symbols[flipped, column[flipped]] ^= 1  # + and - are 0 and 1
        made = _rows(prompts, target, f"k{k}" if k >= 3 else "trivial")
        for row, expression in zip(made, _expressions(digits, symbols), strict=True):
            row["demonstration"] = expression
        rows += made
    return [rows[i] for i in rng.permutation(len(rows))]


def check_signed_sum(prompt: str, completion: str) -> float:
    """1.0 when the completion is a right answer to the prompt, else 0.0; exact, and nothing is ever evaluated as code.

    A right answer alternates single digits and operators, starts and ends with a digit, uses each digit of the prompt
    exactly once, and reaches the target with `*` before + and -. `*` counts only for targets of 100 and more.

    Raises:
        InputError: the prompt is not one of this task.
    """
    match = re.fullmatch(r" *([0-9]{1,6})=([0-9]{1,3}):", prompt)
    if match is None:
        raise InputError(f"signed_sums cannot judge the prompt {prompt!r}: expected digits=target: such as '1951=2:'")
    target = int(match[2])
    if re.fullmatch(r"[0-9](?:[-+*][0-9])*", completion) is None or sorted(completion[::2]) != sorted(match[1]):
        return 0.0
    if "*" in completion and target < _FIRST_PRODUCT_TARGET:
        return 0.0
    total, term = 0, int(completion[0])
    for symbol, digit in zip(completion[1::2], completion[2::2], strict=True):
        if symbol == "*":
            term *= int(digit)
        else:
            total += term
            term = int(digit) if symbol == "+" else -int(digit)
    return float(total + term == target)


def reasoning_gym_rows(name: str, size: int, seed: int, **params: Any) -> list[Row]:
    """Rows of the reasoning-gym data set `name`; each keeps the entry that its verdict needs later.

    Raises:
        InputError: no such data set, an unknown parameter, or values that the data set refuses.
    """
    if size < 1:
        raise InputError(f"reasoning-gym task {name!r} needs size >= 1, not {size}")
    settings = {**params, "size": size, "seed": seed}
    dataset = _reasoning_gym_dataset(name, settings)
    try:
        entries = [dataset[i] for i in range(size)]
    except Exception as error:  # the package's generators fail in many ways on odd settings
        raise InputError(f"reasoning-gym task {name!r} cannot make rows with {settings}: {_one_line(error)}") from error
    return [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "slice": name,
            "reward": "reasoning_gym",
            "task": name,
            "settings": settings,
            "entry": entry,
        }
        for entry in entries
    ]


def equation(text: str, answer: str) -> str:
    """The answer as one line of arithmetic on numbers of the text, such as `70-27=43`; `=43` when there is none.

    Tried in this order: sum, difference, product and quotient of two numbers, then three numbers with + and -.
    """
    goal = Fraction(answer.replace(",", ""))
    names = re.findall(r"[0-9]+(?:\.[0-9]+)?", text)
    numbers = {name: Fraction(name) for name in names}
    for symbol, apply in {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}.items():
        for a, b in itertools.permutations(names, 2):
            if (symbol != "/" or numbers[b]) and apply(numbers[a], numbers[b]) == goal:
                return f"{a}{symbol}{b}={answer}"
    for a, b, c in itertools.permutations(names, 3):
        for first, second in itertools.product((1, -1), repeat=2):
            if numbers[a] + first * numbers[b] + second * numbers[c] == goal:
                return f"{a}{'+-'[first < 0]}{b}{'+-'[second < 0]}{c}={answer}"
    return f"={answer}"


def _reasoning_gym_dataset(name: str, settings: Mapping[str, Any]) -> Any:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(f"task {name!r} needs the package reasoning-gym: pip install reasoning-gym") from error
    if name not in DATASETS:
        raise InputError(f"reasoning-gym has no task {name!r}{nearest(name, list(DATASETS))}")
    make_dataset, make_config = DATASETS[name]
    known = list(make_config.__dataclass_fields__)
    for key in settings:
        if key not in known:
            raise InputError(
                f"reasoning-gym task {name!r} has no parameter {key!r}{nearest(key, known)}: the parameters are "
                f"{', '.join(known)}"
            )
    try:
        config = make_config(**settings)
        if hasattr(config, "validate"):
            config.validate()
        return make_dataset(config=config)
    except (AssertionError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"reasoning-gym task {name!r} refuses {dict(settings)}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _shares(size: int, weights: Sequence[float]) -> list[int]:
    """`size` split in proportion to `weights`, rounded so that the parts add up (largest remainders first)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * size
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(-(exact - counts), kind="stable")[: size - int(counts.sum())]
    counts[rest] += 1
    return counts.tolist()


def _digits_of_slice(rng: np.random.Generator, slice_name: str, count: int) -> list[tuple[int, int]]:
    """Number of problems of a slice by number of digits."""
    if slice_name == "trivial":
        return list(zip((1, 2), _shares(count, (1, 2)), strict=True))
    if slice_name == "hard":
        return list(zip((4, 5, 6), np.bincount(rng.integers(0, 3, size=count), minlength=3).tolist(), strict=True))
    return [(int(slice_name[1:]), count)]


def _symbols_of_slice(slice_name: str) -> int:
    """Number of operators, of + - *, that a slice draws from."""
    return {"trivial": 1, "hard": 3}.get(slice_name, 2)


def _draw(
    rng: np.random.Generator, count: int, k: int, num_symbols: int, excluded: Ints, *, distinct: bool = False
) -> tuple[Ints, Ints, Ints]:
    """`count` problems as digits [n, k] in the order of their expression, symbols [n, k - 1] and target [n]."""
    low, high = (_FIRST_PRODUCT_TARGET, _LAST_TARGET) if num_symbols == 3 else (0, _LAST_TARGET)
    digits, symbols = np.empty((0, k), np.int64), np.empty((0, k - 1), np.int64)
    target = np.empty(0, np.int64)
    while len(target) < count:
        # Digits from 1 to 9: a zero would make + and - the same, and a flipped sign harmless.
        more = max(64, 4 * (count - len(target)))
        new_digits = rng.integers(1, 10, size=(more, k))
        new_symbols = rng.integers(0, num_symbols, size=(more, k - 1))
        new_target = _values(new_digits, new_symbols)
        keep = (new_target >= low) & (new_target <= high)
        if k >= 3:
            keep &= ~np.isin(_keys(new_digits, new_target), excluded)
        digits, symbols = np.concatenate([digits, new_digits[keep]]), np.concatenate([symbols, new_symbols[keep]])
        target = np.concatenate([target, new_target[keep]])
        if distinct:
            first = np.sort(np.unique(_keys(digits, target), return_index=True)[1])
            digits, symbols, target = digits[first], symbols[first], target[first]
    return digits[:count], symbols[:count], target[:count]


def _values(digits: Ints, symbols: Ints) -> Ints:
    """The value of each expression, `*` before + and -."""
    total, term = np.zeros(len(digits), np.int64), digits[:, 0]
    for i in range(symbols.shape[1]):
        symbol, digit = symbols[:, i], digits[:, i + 1]
        times = symbol == _TIMES
        total = np.where(times, total, total + term)
        term = np.where(times, term * digit, np.where(symbol == _MINUS, -digit, digit))
    return total + term


def _keys(digits: Ints, target: Ints) -> Ints:
    """One integer per problem, the same for every order of its digits."""
    powers = 10 ** np.arange(digits.shape[1], dtype=np.int64)
    return (np.sort(digits, axis=1) * powers).sum(axis=1) * 1000 + target


def _prompts(rng: np.random.Generator, digits: Ints, target: Ints) -> list[str]:
    k = digits.shape[1]
    text = (rng.permuted(digits, axis=1) + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    return [
        f"{text[i * k : (i + 1) * k]}={value}:".rjust(SIGNED_SUMS_PROMPT_LENGTH)
        for i, value in enumerate(target.tolist())
    ]


def _expressions(digits: Ints, symbols: Ints) -> list[str]:
    n, k = digits.shape
    characters = np.empty((n, 2 * k - 1), np.uint8)
    characters[:, ::2] = digits + ord("0")
    characters[:, 1::2] = _SYMBOLS[symbols]
    text, width = characters.tobytes().decode("ascii"), 2 * k - 1
    return [text[i * width : (i + 1) * width] for i in range(n)]


def _rows(prompts: list[str], target: Ints, slice_name: str) -> list[Row]:
    return [
        {"prompt": prompt, "answer": str(value), "slice": slice_name, "reward": "signed_sums"}
        for prompt, value in zip(prompts, target.tolist(), strict=True)
    ]


@lru_cache(maxsize=1)
def _eval_problems() -> tuple[tuple[str, tuple[str, ...], Ints, Ints], ...]:
    """The fixed eval problems as (slice, prompts, targets, keys), all distinct; keys only of problems with k >= 3."""
    rng = np.random.default_rng(_EVAL_SEED)
    none = np.empty(0, np.int64)
    problems = []
    for slice_name, count in _EVAL_COUNTS.items():
        # There are only nine problems of one digit: all are in.
        parts = [(1, 9), (2, count - 9)] if slice_name == "trivial" else _digits_of_slice(rng, slice_name, count)
        for k, part in parts:
            digits, _, target = _draw(rng, part, k, _symbols_of_slice(slice_name), none, distinct=True)
            keys = _keys(digits, target) if k >= 3 else none
            problems.append((slice_name, tuple(_prompts(rng, digits, target)), target, keys))
    return tuple(problems)


def _eval_keys() -> Ints:
    return np.concatenate([keys for *_, keys in _eval_problems()])


def _eval_rows(size: int | None) -> list[Row]:
    total = sum(_EVAL_COUNTS.values())
    size = total if size is None else size
    if not 1 <= size <= total:
        raise InputError(f"the eval split of signed_sums has {total} rows: size must be in 1..{total}, got {size}")
    of_slice: dict[str, list[Row]] = {name: [] for name in _EVAL_COUNTS}
    for slice_name, prompts, target, _ in _eval_problems():
        of_slice[slice_name] += _rows(list(prompts), target, slice_name)
    rng = np.random.default_rng([_EVAL_SEED, size])
    counts = _shares(size, list(_EVAL_COUNTS.values()))
    rows = [row for rows, count in zip(of_slice.values(), counts, strict=True) for row in rows[:count]]
    return [rows[i] for i in rng.permutation(len(rows))]
