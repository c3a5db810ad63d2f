"""The rows that `PacedTrainer` trains on: their numbers, and refusals of rows that TRL could not use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset as Rows

from paced_fast.errors import InputError

try:
    from datasets import Dataset
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): pip install 'paced-fast[trl]'") from error

# The field that numbers the prompts; reward functions do not see it.
INDEX = "paced_prompt_index"

_HANDED_BY_TRL = frozenset(
    ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
)


class Numbered(Rows[dict[str, Any]]):
    """The rows of `data`, each with its number under `INDEX`: outside of the data, where no transform or format of
    theirs can drop it."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What a loader calls for a batch; transforms work on batches."""
        rows = self.data.__getitems__(numbers)
        if len(rows) != len(numbers):
            raise InputError(
                f"the transform of train_dataset makes {len(rows)} rows of {len(numbers)}, and a prompt goes by the "
                "number of its row: let the transform keep the number of rows, or map the data before"
            )
        if rows and INDEX in rows[0]:
            raise InputError(f"train_dataset has a column {INDEX!r}, which PacedTrainer uses itself: rename the column")
        return [{**row, INDEX: number} for row, number in zip(rows, numbers, strict=True)]


def number_of(row: dict[str, Any]) -> int:
    """The number of a row that a training loader gave; InputError where another loader gave it."""
    if INDEX not in row:
        raise InputError(
            "log_z='learned' and prompt_sampling='paced' number the prompts in PacedTrainer's own loader: do not "
            "override get_train_dataloader or _get_dataloader with them"
        )
    return row[INDEX]


def check_data(options: dict[str, Any]) -> None:
    """Refuse, of what GRPOTrainer's arguments name as data, rows whose columns are known and lack something.

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
    """Refuse rows whose prompt is the empty text, for a tokenizer that makes no token of it; TRL would stop there, but
    not before it comes to that row.

    Raises:
        InputError: there is one.
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
    """What `trainer._calculate_rewards` returns meanwhile, whichever class of the trainer has the last word on it.

    Raises:
        InputError: in that call, for a reward that is infinite.
    """
    compute, own, kept = trainer._calculate_rewards, vars(trainer).get("_calculate_rewards"), []

    def keeping(*args: Any, **options: Any) -> Tensor:
        kept.append(compute(*args, **options))
        for name, column in zip(trainer.reward_func_names, kept[-1].unbind(1), strict=True):
            if bool(column.isinf().any()):
                raise InputError(f"reward function {name} returned an infinite reward: return None for no verdict")
        return kept[-1]

    trainer._calculate_rewards = keeping
    try:
        yield kept
    finally:
        del trainer._calculate_rewards
        if own is not None:
            trainer._calculate_rewards = own


def check_tokens(prompts: Iterable[Any], prompt_ids: Iterable[Sequence[int]]) -> None:
    """Refuse a prompt without tokens: there is nothing to predict its first token from."""
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not len(ids):
            raise InputError(f"the prompt {prompt!r} has no tokens: leave such rows out, or give it a chat template")


def _datasets(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("train_dataset", "eval_dataset"):
        data = options[name]
        for part, rows in data.items() if isinstance(data, dict) else [("", data)]:
            yield f"{name}[{part!r}]" if part else name, rows


def columns_of(data: Any) -> list[str] | None:
    """The columns that rows of `data` will have; None where only a row can tell: a stream, or a transform of rows."""
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
    """Refuse rows without what TRL looks for in them.

    Args:
        columns: of the rows.
        data: the name of the data set, for the message.
        functions: reward functions and models.
        makes_prompts: an environment hands over the prompts.
        adds_fields: a rollout function may hand reward functions more than the rows have.

    Raises:
        InputError: there are no prompts, or a reward function cannot be called without a column that is missing.
    """
    present = set(columns)
    shown = ", ".join(sorted(present - {INDEX}))
    if not makes_prompts and "prompt" not in present:
        raise InputError(f"{data} has no column 'prompt', but {shown}: rename the one with the prompts")
    for function in () if adds_fields else functions:
        missing = [name for name in _required(function) if name not in present | _HANDED_BY_TRL]
        if missing:
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(
                f"reward function {name} needs the column {missing[0]!r}, and {data} has {shown}: "
                "add the column, or rename it or the parameter"
            )


def _required(function: Any) -> list[str]:
    """Names of arguments without which a call is an error; the parameters of what is called, not of what it wraps."""
    if not callable(function) or hasattr(function, "forward") or hasattr(function, "__signature__"):
        return []
    try:
        parameters = _signature(function).parameters.values()
    except (ValueError, TypeError):  # some callables have no signature to read
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is p.empty]


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, follow_wrapped=False)
