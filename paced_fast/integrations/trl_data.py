"""Training rows of `PacedTrainer`: numbering them, and refusing rows that TRL could not use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset as Rows

from paced_fast.errors import InputError, pip_install

try:
    from datasets import Dataset
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): {pip_install('trl')}") from error

# Field with the number of the prompt; reward functions do not see it.
INDEX = "paced_prompt_index"

_HANDED_BY_TRL = frozenset(
    ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
)


class Numbered(Rows[dict[str, Any]]):
    """Rows of `data`, each with its number under `INDEX`.

    The number is added outside `data`, so that no transform or format of `data` can drop it.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return a batch of rows; called by the data loader, because transforms work on batches."""
        rows = self.data.__getitems__(numbers)
        if len(rows) != len(numbers):
            raise InputError(
                f"the transform of train_dataset makes {len(rows)} rows of {len(numbers)}, but a prompt is identified "
                "by the number of its row: let the transform keep the number of rows, or use Dataset.map instead"
            )
        if rows and INDEX in rows[0]:
            raise InputError(f"train_dataset has a column {INDEX!r}, which PacedTrainer uses itself: rename the column")
        return [{**row, INDEX: number} for row, number in zip(rows, numbers, strict=True)]


def number_of(row: dict[str, Any]) -> int:
    """Return the number of a row; InputError if the row did not come from PacedTrainer's own training loader."""
    if INDEX not in row:
        raise InputError(
            "log_z='learned' and prompt_sampling='paced' need the row numbers that PacedTrainer's loader adds: do not "
            "override get_train_dataloader or _get_dataloader"
        )
    return row[INDEX]


def check_data(options: dict[str, Any]) -> None:
    """Refuse the datasets among GRPOTrainer's arguments whose columns are known and incomplete.

    Raises:
        InputError: see `check_rows`.
    """
    functions = options["reward_funcs"]
    for label, rows in _datasets(options):
        columns = columns_of(rows)
        if columns is not None:
            check_rows(
                columns,
                label,
                functions=functions if isinstance(functions, list) else [functions],
                makes_prompts=options["environment_factory"] is not None,
                adds_fields=options["rollout_func"] is not None,
            )


def check_empty_prompts(options: dict[str, Any]) -> None:
    """Refuse rows with an empty prompt, for a tokenizer that turns empty text into no tokens.

    TRL would stop at such a row too, but only on reaching it.

    Raises:
        InputError: there is such a row.
    """
    for label, rows in _datasets(options):
        if columns_of(rows) is None or not isinstance(rows, Dataset) or "prompt" not in rows.column_names:
            continue
        if getattr(rows.features["prompt"], "dtype", None) == "string":
            for number, prompt in enumerate(rows.with_format(None)["prompt"]):
                if prompt == "":
                    raise InputError(f"row {number} of {label} has an empty prompt: leave such rows out")


@contextmanager
def kept_rewards(trainer: Any) -> Iterator[list[Tensor]]:
    """Collect the results of `trainer._calculate_rewards` inside the context, also if a subclass overrides it.

    Raises:
        InputError: raised by that call if a reward is infinite.
    """
    compute, own, kept = trainer._calculate_rewards, vars(trainer).get("_calculate_rewards"), []

    def keeping(*args: Any, **options: Any) -> Tensor:
        kept.append(compute(*args, **options))
        for name, column in zip(trainer.reward_func_names, kept[-1].unbind(1), strict=True):
            if bool(column.isinf().any()):
                raise InputError(f"reward function {name} returned an infinite reward: return None if it cannot decide")
        return kept[-1]

    trainer._calculate_rewards = keeping
    try:
        yield kept
    finally:
        del trainer._calculate_rewards
        if own is not None:
            trainer._calculate_rewards = own


def check_tokens(prompts: Iterable[Any], prompt_ids: Iterable[Sequence[int]]) -> None:
    """Refuse a prompt without tokens: nothing precedes the first token of its completion."""
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not len(ids):
            raise InputError(f"the prompt {prompt!r} has no tokens: leave such rows out, or give it a chat template")


def _datasets(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("train_dataset", "eval_dataset"):
        data = options[name]
        for part, rows in data.items() if isinstance(data, dict) else [("", data)]:
            yield f"{name}[{part!r}]" if part else name, rows


def columns_of(data: Any) -> list[str] | None:
    """Return the columns of the rows of `data`; None if only a row can show them (a stream or a row transform)."""
    if isinstance(data, Dataset) and data.format["type"] == "custom":
        return None
    columns = getattr(data, "column_names", None)
    return columns if isinstance(columns, list) else None


def check_rows(
    columns: Iterable[str],
    data: str,
    *,
    functions: Iterable[Any],
    makes_prompts: bool,
    adds_fields: bool,
) -> None:
    """Refuse rows that lack columns that TRL needs.

    Args:
        columns: column names of the rows.
        data: name of the dataset, for the message.
        functions: reward functions and models.
        makes_prompts: an environment supplies the prompts.
        adds_fields: a rollout function may pass reward functions fields that the rows do not have.

    Raises:
        InputError: there are no prompts, or a column that a reward function requires is missing.
    """
    present = set(columns)
    shown = ", ".join(sorted(present - {INDEX}))
    if not makes_prompts and "prompt" not in present:
        raise InputError(f"{data} has no column 'prompt', only {shown}: rename the column of the prompts")
    for function in () if adds_fields else functions:
        missing = [name for name in _required(function) if name not in present | _HANDED_BY_TRL]
        if missing:
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(
                f"reward function {name} needs the column {missing[0]!r}, but {data} has {shown}: "
                "add the column, or rename it or the parameter"
            )


def _required(function: Any) -> list[str]:
    """Return the names of required arguments, from the signature of `function` itself, not of a function it wraps."""
    if not callable(function) or hasattr(function, "forward") or hasattr(function, "__signature__"):
        return []
    try:
        parameters = _signature(function).parameters.values()
    except (ValueError, TypeError):  # some callables have no readable signature
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is p.empty]


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, follow_wrapped=False)
