"""Training, evaluation, comparison and reports from Python, in a notebook or a script.

    from paced_fast.api import train

    result = train("path/or/hub-id", rows, reward=my_reward, eval_data=held_out, steps=50)
    result.metrics                     # a table, one row per step
    result.plot()                      # the learning curve
    result.generate("What is 2 + 3?")  # the trained policy

Rows are dictionaries, a `datasets.Dataset` or a source such as `train.jsonl`; the reward is a function or the
name of a built-in one. Importing this module imports neither PyTorch nor transformers; the first call does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from paced_fast.api.result import Comparison, Evaluated, Result, run_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Comparison", "Evaluated", "Result", "compare", "evaluate", "report", "train"]

Data: TypeAlias = str | Path | Sequence[str] | Iterable[Mapping[str, Any]]
"""A source, several sources, or rows: a list of dictionaries, a `datasets.Dataset`, or anything that yields rows."""
Reward: TypeAlias = str | Callable[..., Any]
"""Name of a reward, a weighted sum of names, or a function `reward(prompts, completions, **columns)`."""
_COMPARED = ("run", "algorithm", "seed", "accuracy_before", "accuracy_after", "rollouts", "train_seconds", "steps")
"""Columns of a comparison that are shown where not all have room, the most important first."""


def train(
    model: str | Path | PreTrainedModel,
    data: Data,
    *,
    reward: Reward | None = None,
    eval_data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Result:
    """Train a model by PACED-RL and return the result; the run folder holds the same as after the command.

    Interrupting (Ctrl-C, or the stop button of a notebook) ends the step, saves a checkpoint and returns what there is;
    a second interrupt within the step raises KeyboardInterrupt at once.

    Args:
        model: folder or hub id of a causal language model, or a model object, which is left as it is: a copy is
            trained.
        data: prompts to train on. Columns with the prompt and the answer are recognised by their usual names.
        reward: judges completions, in [0, 1] or None for no verdict. A function of yours runs in this process, in this
            thread, with `reward.function_seconds` for one call (outside of the main thread nothing but the end of the
            process can end a call, so one that takes longer does end it). Code of models is run, and their answers are
            computed with, in isolated processes only, by the built-in rewards. None: what the data's format says,
            `math` for plain answers.
        eval_data: held-out prompts, evaluated before, during and after training; None: no evaluation.
        tokenizer: of a model object; a name brings its own.
        run_dir: folder of the run; None: a new one in `runs`, named after the model.
        resume: continue the run in `run_dir` after its newest checkpoint; give the same model, data and reward.
        progress: print what the run does, and a line every few seconds; False: errors and warnings only.
        settings: any further setting by its name, such as {"optimizer.learning_rate": 1e-5} or
            {"optimizer": {"learning_rate": 1e-5}}. docs/settings.md lists them.
        **more: settings as keywords: `steps=50`, `seed=1`, `algorithm="grpo"`, `optimizer={"learning_rate": 1e-5}`, or
            `**{"optimizer.learning_rate": 1e-5}`. `preset="qwen_math_7b"` begins with the settings of a preset, its
            warm start included.

    Raises:
        InputError: something given is wrong; one line names it and the remedy. Nothing has been trained.
        TrainingError: the run stopped itself, and says why and after which step. A reward function that fails after the
            first step ends it so, with a checkpoint of the last whole step: `resume=True` goes on from there.
    """
    return _run_module(progress=progress).train_given(
        model,
        data,
        reward=reward,
        eval_data=eval_data,
        tokenizer=tokenizer,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
        settings={**(settings or {}), **more},
    )


def evaluate(
    model: str | Path | Result | PreTrainedModel,
    data: Data | None = None,
    *,
    reward: Reward | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    benchmarks: str | Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> Evaluated:
    """Evaluate a run or a model on prompts of yours, on benchmarks, or on the run's own held-out prompts.

    Args:
        model: a result, a run folder, a model's folder or hub id, or a model object.
        data: prompts, as for `train`; None: `benchmarks`, or the held-out prompts of the run.
        reward: judges completions, as for `train`; None: what the data's format says, and for a result the function
            that it was trained with.
        tokenizer: of a model object.
        benchmarks: names such as "gsm8k"; see `python -m paced_fast evaluate --help`.
        progress: print what is evaluated; the figures are in what is returned, which prints them.
        **options: those of the command, such as `samples=32`, `temperature=0.6`, `top_p=0.95`, `limit=100`,
            `max_completion_tokens=512`, `step=50`.

    Raises:
        InputError: something given is wrong; one line names it and the remedy.
    """
    return _run_module(progress=progress).evaluate_given(
        model,
        data,
        reward=reward,
        tokenizer=tokenizer,
        benchmarks=[benchmarks] if isinstance(benchmarks, str) else list(benchmarks),
        progress=progress,
        options=options,
    )


def _run_module(*, progress: bool) -> Any:
    """Import what trains and evaluates, without tqdm's advice about widgets in a notebook that has none.

    The first time takes seconds, of which `progress` tells.
    """
    if progress and "torch" not in sys.modules:
        sys.stdout.write("loading PyTorch and transformers\n")
        sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from paced_fast.api import run
    return run


def compare(*runs: str | Path | Result, out: str | Path | None = None) -> Comparison:
    """Compare runs: a page with their curves laid over each other, and a table of their summaries.

    Args:
        runs: two run folders or results, or more.
        out: file of the page; None: compare.html beside the first run.

    Raises:
        InputError: a folder is not a run folder, or is given twice.
    """
    from paced_fast.api.tables import table
    from paced_fast.errors import InputError
    from paced_fast.report import compare as write_comparison

    if len(runs) < 2:
        raise InputError(f"compare is given {len(runs)} runs: give two run folders or results, or more")
    folders = [run_path(run) for run in runs]
    page = write_comparison(folders, out)
    rows = [{"run": str(folder), **Result(folder).summary} for folder in folders]
    plain = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    return Comparison(page=page, table=table(plain, _COMPARED))


def report(run: str | Path | Result) -> Path:
    """Write the report of a run, report.html in its folder, and return its path; also while the run goes on.

    Raises:
        InputError: the folder is not a run folder, or has no record yet.
    """
    from paced_fast.report import make_report

    return make_report(run_path(run))
